"""The builder of this package: sources and a tokenizer in, sequences and ledgers out."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.atomic import published_folder
from qlora_kit.data.cache import cache_folder, stamp_used
from qlora_kit.data.chunks import Chunk, rendered_chunks
from qlora_kit.data.examples import AnyExample, Conversation, Example
from qlora_kit.data.fit import fit_each, fit_runs
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.losses import losses
from qlora_kit.data.mark import LossOn
from qlora_kit.data.mixing import book_draws, training_order
from qlora_kit.data.read import files_left_out, read_source, source_fingerprint
from qlora_kit.data.render import end_of_turn_id, render
from qlora_kit.data.rows import BadRow, RowRefused
from qlora_kit.data.schemas import Recogniser, content_key, fine_tuning_example
from qlora_kit.data.select import DUPLICATE, Selection, held_out_threshold
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.store import StoredSequences, StoreWriter, is_whole
from qlora_kit.data.stream import Pass, StreamedSequences
from qlora_kit.data.template import PROBE, PROBE_ORIGIN
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec, SourceSpec
    from qlora_kit.recipe.data import PartName

UNWANTED = "an answer that is rated as unwanted"
_ROWS_BETWEEN_CHECKS = 1024
_LEDGER = "ledger.json"


@dataclass(frozen=True)
class Part:
    """One part of the data, train or eval.

    `examples` are what the rows of an eval part say, also of those that were then dropped or cut
    for their length; a training part keeps none. `sequences` is what came of them, `ledger` the
    count.
    """

    examples: tuple[Example, ...]
    sequences: Sequence[TokenSequence]
    ledger: Ledger
    stream: StreamedSequences | None = None
    """Where the rows are read while training; `sequences` are then the first ones alone."""
    digests: tuple[str, ...] = ()
    """Of each of its sources, as `source_fingerprint`."""

    @classmethod
    def empty(cls) -> Part:
        """The part of a recipe that names no source for it."""
        return cls((), (), Ledger())

    @property
    def num_supervised(self) -> int:
        return self.ledger.supervised_tokens


def prepare_train(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> Part:
    """Read, check, render and fit the training rows, or take them from the cache.

    `stop_ids` are the tokens at which generation stops; the end-of-turn token that is trained
    must be one of them.

    Raises:
        DataError: nothing is left to train on, too much would be lost, or the model would
            never learn to stop.
    """
    if spec.streaming:
        return _stream(spec, tokenizer, stop_ids)
    return _refuse_losses("train", read_part("train", spec, tokenizer, stop_ids), spec)


def prepare_eval(
    spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> Part:
    """The same for the eval rows, of their own sources or held out of the training rows; empty
    where there are none.
    """
    if not spec.eval and spec.held_out is None:
        return Part.empty()
    part = _refuse_losses("eval", read_part("eval", spec, tokenizer, stop_ids), spec)
    sources = spec.eval or spec.train
    return replace(part, examples=tuple(_selected(sources, spec)))


def _stream(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> Part:
    """Training rows that are read while training; the first ones are read here, to see that they
    can be trained on.
    """

    def one_pass(at: Pass) -> Iterator[TokenSequence]:
        selection = selection_for("train", spec)
        num_rows, number = at.num_rows, at.num_sequences
        chunks = _chunks(spec.train, spec, selection, tokenizer, stop_ids, at.read, num_rows)
        for chunk in chunks:
            at.begin_chunk(num_rows, number)
            for sequence in fit_each(chunk.examples, chunk.rendered, spec, at.fitted):
                number += 1
                if number % _ROWS_BETWEEN_CHECKS == 0:
                    _refuse_losses("train", Part((), (), at.booked()), spec)
                yield sequence
            num_rows += len(chunk.examples)
        _refuse_losses("train", Part((), (), at.booked()), spec)

    first = tuple(islice(one_pass(Pass()), _ROWS_BETWEEN_CHECKS))
    ledger = Ledger()
    digests = tuple(source_fingerprint(one) for one in spec.train)
    related = (*digests, *(source_fingerprint(one) for one in spec.eval))
    key = cache_folder("train", spec, related, tokenizer, stop_ids).name
    return Part((), first, ledger, StreamedSequences(one_pass, ledger, spec.seed, key=key), digests)


def read_part(
    name: PartName, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> Part:
    """What came of the rows of one part, without its examples, however many rows were lost.

    Raises:
        DataError: a source cannot be read, or the model would never learn to stop.
    """
    sources = spec.eval if name == "eval" and spec.eval else spec.train
    related = sources if name == "eval" else (*spec.train, *spec.eval)
    fingerprints = [source_fingerprint(source) for source in related]
    folder = cache_folder(name, spec, fingerprints, tokenizer, stop_ids)
    if folder.is_dir() and not is_whole(folder):
        shutil.rmtree(folder)
    if not folder.is_dir():
        with published_folder(folder) as draft:
            ledger = _render_all(
                sources, spec, selection_for(name, spec), tokenizer, stop_ids, draft
            )
            (draft / _LEDGER).write_text(json.dumps(ledger.state()), encoding="utf-8")
            if [source_fingerprint(source) for source in related] != fingerprints:
                raise DataError(
                    "a source of the data was changed while it was read; start again once it is "
                    "finished."
                )
    stamp_used(folder)
    ledger = Ledger.from_state(json.loads((folder / _LEDGER).read_text(encoding="utf-8")))
    # Not of the cached entry, which stands for the bytes of the files that are read.
    left_out = {source.path: list(files_left_out(source)) for source in sources}
    ledger.left_out = {path: files for path, files in left_out.items() if files}
    ledger.check_balance()
    sequences = StoredSequences(folder)
    if name == "train":
        order = training_order(sequences.groups(), spec)
        book_draws(sequences, order, ledger)
        ledger.check_balance()
        sequences = sequences.in_order(order)
    return Part((), sequences, ledger, digests=tuple(fingerprints[: len(sources)]))


def fingerprint_of(part: Part) -> str:
    """Of the tokens, in order, and which of them are supervised; of a stream, of its sources."""
    if isinstance(part.sequences, StoredSequences):
        return part.sequences.fingerprint()
    return hashlib.sha256(repr(list(part.digests)).encode()).hexdigest()


def read_examples(sources: Sequence[SourceSpec], needs_answer: bool = True) -> Iterator[AnyExample]:
    """Every sound example of every source, in order; faulty rows are passed over."""
    ledger = Ledger()
    return (example for _, example in _examples(sources, needs_answer, ledger))


def selection_for(part: PartName, spec: DataSpec) -> Selection:
    """What decides which sound rows of a part are used."""
    needs_answer = spec.loss_on != "all"
    threshold = None
    if spec.held_out is not None:
        threshold = held_out_threshold(spec, read_examples(spec.train, needs_answer))
    keys: frozenset[bytes] = frozenset()
    if part == "train" and spec.eval and spec.leaks != "keep":
        keys = frozenset(content_key(one) for one in read_examples(spec.eval, needs_answer))
    return Selection(spec, part, keys, threshold)


def prove_end_of_turn(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], loss_on: LossOn = "assistant"
) -> int:
    """Show that the token that ends an assistant turn is supervised and stops generation.

    Raises:
        DataError: it is not.
    """
    end = end_of_turn_id(tokenizer)
    probe = render(PROBE, tokenizer, loss_on)
    learns_answers = not isinstance(loss_on, tuple) or "assistant" in loss_on
    if learns_answers and end not in probe.labels:
        raise DataError(f"{PROBE_ORIGIN}: the token that ends a turn would not be trained on.")
    if end not in stop_ids:
        tokens = tokenizer.convert_ids_to_tokens([end, *sorted(stop_ids)])
        stops = [token or "a token it does not have" for token in tokens[1:]]
        raise DataError(
            f"the chat template ends a turn with {tokens[0]}, but generation stops only at "
            f"{', '.join(stops) or 'nothing'}: the tuned model would not stop. Use the "
            "template that belongs to the model, or name it with model.chat_template."
        )
    return end


def _selected(sources: Sequence[SourceSpec], spec: DataSpec) -> Iterator[Example]:
    """What the eval rows say."""
    selection = selection_for("eval", spec)
    splits = spec.split_special_tokens
    for _, example in _examples(sources, spec.loss_on != "all", Ledger(), splits):
        answer = fine_tuning_example(example)
        if answer is not None and selection.rule_against(example) is None:
            yield answer


def _examples(
    sources: Sequence[SourceSpec],
    needs_answer: bool,
    ledger: Ledger,
    split_special_tokens: bool = True,
    *,
    streaming: bool = False,
) -> Iterator[tuple[int, AnyExample]]:
    """Sound rows with the number of their source; faulty ones are booked."""
    for group, source in enumerate(sources):
        recogniser = Recogniser(source, needs_answer, split_special_tokens)
        num_before = ledger.num_rows
        for row in read_source(source, streaming=streaming):
            ledger.num_rows += 1
            if isinstance(row, BadRow):
                ledger.drop(row.reason, row.origin, row.detail)
                continue
            try:
                example = recogniser.recognise(row)
            except RowRefused as refused:
                ledger.drop(refused.reason, row.origin, refused.detail)
            else:
                yield group, example
        ledger.rows_of[source.name] += ledger.num_rows - num_before
        ledger.schemas[source.path] = recogniser.describe()
        if recogniser.ignored_keys:
            ledger.ignored[source.path] = list(recogniser.ignored_keys)


def _render_all(
    sources: Sequence[SourceSpec],
    spec: DataSpec,
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    folder: Path,
) -> Ledger:
    """Render every row that is used into a store in `folder`."""
    ledger = Ledger()
    with StoreWriter(folder) as writer:
        for chunk in _chunks(sources, spec, selection, tokenizer, stop_ids, ledger):
            for first, end, block in fit_runs(chunk.examples, chunk.rendered, spec, ledger):
                writer.add(block, chunk.groups[first:end])
    ledger.check_balance()
    return ledger


def _chunks(
    sources: Sequence[SourceSpec],
    spec: DataSpec,
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    ledger: Ledger,
    num_passed: int = 0,
) -> Iterator[Chunk]:
    """Rendered rows; those that are not used are booked, and the first `num_passed` that are used
    are read alone.
    """
    needs_answer, splits = spec.loss_on != "all", spec.split_special_tokens
    found = _examples(sources, needs_answer, ledger, splits, streaming=spec.streaming)
    rows = islice(_used(found, sources, selection, ledger), num_passed, None)
    proved = False
    for chunk in rendered_chunks(rows, tokenizer, spec.loss_on):
        if not proved and any(isinstance(one, Conversation) for one in chunk.examples):
            prove_end_of_turn(tokenizer, stop_ids, spec.loss_on)
            proved = True
        yield chunk


def _used(
    examples: Iterable[tuple[int, AnyExample]],
    sources: Sequence[SourceSpec],
    selection: Selection,
    ledger: Ledger,
) -> Iterator[tuple[int, Example]]:
    """What of the sound rows is rendered; the others are booked."""
    for group, example in examples:
        rule = selection.rule_against(example)
        if rule == DUPLICATE:
            ledger.repeat(sources[group].name, selection.first_of(example) or "")
        answer = fine_tuning_example(example) if rule is None else None
        if rule is not None or answer is None:
            ledger.put_aside(rule or UNWANTED, example.origin)
            continue
        yield group, answer


def _refuse_losses(name: PartName, part: Part, spec: DataSpec) -> Part:
    fault = losses(name, part.ledger, spec)
    if fault is not None:
        shown = "".join(f"\n  - {finding}" for finding in part.ledger.findings())
        raise DataError(fault + shown)
    return part
