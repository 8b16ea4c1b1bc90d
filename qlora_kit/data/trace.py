"""What becomes of one row: read, recognised, selected, rendered and fitted, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.examples import AnyExample, Preference
from qlora_kit.data.fit import fit
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.prepare import NOTE_REJECTED, UNWANTED, PartName, selection_for
from qlora_kit.data.preview import Shown, show
from qlora_kit.data.read import read_source
from qlora_kit.data.render import render
from qlora_kit.data.rows import BadRow, Row, RowRefused
from qlora_kit.data.schemas import Recogniser, fine_tuning_example
from qlora_kit.data.select import DUPLICATE, Selection
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec, SourceSpec


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
    fates: list[Fate] = []
    seen: dict[str, int] = {}
    held_out = spec.train if spec.held_out is not None else ()
    parts: tuple[tuple[PartName, tuple[SourceSpec, ...]], ...] = (
        ("train", spec.train),
        ("eval", spec.eval or held_out),
    )
    for part, sources in parts:
        selection = selection_for(part, spec)
        for row, found in _rows(sources, spec):
            seen[row.source] = row.number
            if row.number == number and _names(file, row.source):
                fates.append(_fate(part, row, found, selection, spec, tokenizer))
                break
            if not isinstance(found, RowRefused):
                selection.rule_against(found)
    if not fates:
        there = ", ".join(f"{name} (to {last})" for name, last in list(seen.items())[:5])
        raise DataError(
            f"no row {number} of {file} is read; the recipe's sources and their last rows: "
            f"{there}. A row is FILE:LINE, as findings name it; blank lines are no rows."
        )
    return fates


def _rows(
    sources: tuple[SourceSpec, ...], spec: DataSpec
) -> Iterator[tuple[Row | BadRow, AnyExample | RowRefused]]:
    for source in sources:
        recogniser = Recogniser(source, needs_answer=spec.loss_on != "all")
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


def _names(file: str, source: str) -> bool:
    """Whether `file` is the path of a source, or its end."""
    asked, path = Path(file).expanduser(), Path(source)
    return path.parts[-len(asked.parts) :] == asked.parts or path.absolute() == asked.absolute()


def _fate(
    part: PartName,
    row: Row | BadRow,
    found: AnyExample | RowRefused,
    selection: Selection,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> Fate:
    record = json.dumps(row.record, ensure_ascii=False) if isinstance(row, Row) else ""

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
    notes = rendered.notes
    if isinstance(found, Preference):
        notes = (*notes, NOTE_REJECTED)
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
