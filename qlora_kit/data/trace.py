"""What becomes of one row: read, recognised, selected, rendered and fitted, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.examples import AnyExample
from qlora_kit.data.fit import fit
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pieces import Shown, show
from qlora_kit.data.prepare import UNWANTED, selection_for
from qlora_kit.data.read import read_source, source_files
from qlora_kit.data.render import render
from qlora_kit.data.rows import BadRow, Row, RowRefused
from qlora_kit.data.schemas import Recogniser, fine_tuning_example
from qlora_kit.data.select import DUPLICATE, Selection
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec, SourceSpec
    from qlora_kit.recipe.data import PartName

_MOST_NAMES = 5


@dataclass(frozen=True)
class Fate:
    """What became of a row in one part of the data."""

    part: PartName
    origin: str
    outcome: str
    """In words: kept, or why not."""
    record: str
    """The row as it was read, as JSON; empty where it could not be."""
    sequences: tuple[Shown, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "sequences": [one.as_dict() for one in self.sequences]}


def trace_row(
    file: str,
    number: int,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Fate]:
    """What becomes of row `number` of a file, in each part that reads it.

    Rows before it are read too: whether it is a duplicate depends on them.

    Args:
        file: as the recipe names it, or the end of that (`rows.jsonl` of `data/rows.jsonl`).

    Raises:
        DataError: no source has such a row, or one cannot be read.
    """
    held_out = spec.train if spec.held_out is not None else ()
    parts: tuple[tuple[PartName, tuple[SourceSpec, ...]], ...] = (
        ("train", spec.train),
        ("eval", spec.eval or held_out),
    )
    source = _one_source(file, [*spec.train, *spec.eval])
    fates: list[Fate] = []
    last = 0
    for part, sources in parts:
        if source not in _sources_of(sources):
            continue
        selection = selection_for(part, spec)
        for row, found in _rows(sources, spec):
            last = max(last, row.number) if row.source == source else last
            if row.number == number and row.source == source:
                fates.append(_fate(part, row, found, selection, spec, tokenizer))
                break
            if not isinstance(found, RowRefused):
                selection.rule_against(found)
    if not fates:
        raise DataError(
            f"{source} has no row {number}; the last one that is read is {last}. A row goes by "
            "its line in the file, and a blank line is none."
        )
    return fates


def _one_source(file: str, sources: Sequence[SourceSpec]) -> str:
    """The file of the recipe that is meant, as origins name it."""
    asked = Path(file).expanduser()
    names = list(dict.fromkeys(_sources_of(sources)))
    exact = [one for one in names if one == file or Path(one).absolute() == asked.absolute()]
    fitting = exact or [one for one in names if Path(one).parts[-len(asked.parts) :] == asked.parts]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join((fitting or names)[:_MOST_NAMES])
    if fitting:
        raise DataError(f"{file} can be any of {shown}; say more of its path.")
    raise DataError(f"{file} is no file that this recipe reads; it reads {shown}.")


def _sources_of(sources: Sequence[SourceSpec]) -> list[str]:
    """The names that origins of these sources begin with."""
    return [
        name
        for source in sources
        for name in ([one.name for one in source_files(source)] or [source.path])
    ]


def _rows(
    sources: tuple[SourceSpec, ...], spec: DataSpec
) -> Iterator[tuple[Row | BadRow, AnyExample | RowRefused]]:
    for source in sources:
        recogniser = Recogniser(source, spec.loss_on != "all", spec.split_special_tokens)
        for row in read_source(source):
            if isinstance(row, BadRow):
                yield row, RowRefused(row.origin, row.reason, row.detail)
                continue
            try:
                example = recogniser.recognise(row)
            except RowRefused as refused:
                yield row, refused
            else:
                yield row, example


def _fate(
    part: PartName,
    row: Row | BadRow,
    found: AnyExample | RowRefused,
    selection: Selection,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> Fate:
    record = json.dumps(row.record, ensure_ascii=False, default=str) if isinstance(row, Row) else ""

    def fate(outcome: str, *sequences: Shown, notes: tuple[str, ...] = ()) -> Fate:
        return Fate(part, row.origin, outcome, record, sequences, notes)

    if isinstance(found, RowRefused):
        return fate(_dropped(found))
    first = selection.first_of(found)
    rule = selection.rule_against(found)
    example = fine_tuning_example(found) if rule is None else None
    if example is None:
        same = f" ({first})" if rule == DUPLICATE else ""
        return fate(f"set aside: {rule or UNWANTED}{same}")
    try:
        rendered = render(example, tokenizer, spec.loss_on)
    except RowRefused as refused:
        return fate(_dropped(refused))
    ledger = Ledger(num_rows=1)
    kept = [show(one, tokenizer) for one in fit(example, rendered, spec, ledger)]
    notes = (*rendered.notes, *example.notes)
    if not kept:
        [reason] = ledger.dropped
        return fate(f"dropped: {reason}, {rendered.num_tokens:,} tokens", show(rendered, tokenizer))
    used = "trained on" if part == "train" else "evaluated"
    how = ""
    if ledger.truncated:
        how = f", truncated from {rendered.num_tokens:,} tokens"
    elif ledger.split:
        how = f", split into {len(kept)} sequences"
    return fate(f"{used}{how}", *kept, notes=notes)


def _dropped(refused: RowRefused) -> str:
    return f"dropped: {refused.reason}" + (f" ({refused.detail})" if refused.detail else "")
