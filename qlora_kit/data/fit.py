"""What becomes of a sequence that is longer than max_length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_kit.data.examples import Example, PlainText
from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX, Block, Rendered, TokenSequence

if TYPE_CHECKING:
    from qlora_kit.recipe import DataSpec

OVERLENGTH = "longer than max_length"
NOTHING_SUPERVISED = "nothing supervised"
NOTHING_LEFT = "nothing supervised before max_length"


def fit_runs(
    examples: Sequence[Example], rendered: Rendered, spec: DataSpec, ledger: Ledger
) -> Iterator[tuple[int, int, Block]]:
    """Fit rows to max_length and book them: those that fit as they are in runs, others alone.

    A block comes with the number of its first row and that of the row behind its last.
    """
    block = rendered.block
    fits = (block.num_supervised() > 0) & (block.lengths <= spec.max_length)
    first = 0
    for is_run, run in groupby(fits.tolist()):
        end = first + sum(1 for _ in run)
        if is_run:
            kept = block.run(first, end)
            _book_kept(kept, examples[first:end], ledger)
            yield first, end, kept
        else:
            for number in range(first, end):
                for one in _fit_row(examples[number], rendered[number], spec, ledger):
                    yield number, number + 1, Block.of([one])
        first = end


def fit_each(
    examples: Sequence[Example], rendered: Rendered, spec: DataSpec, ledger: Ledger
) -> Iterator[TokenSequence]:
    """As `fit_runs`, but no row is booked before those ahead of it were taken."""
    for example, one in zip(examples, rendered, strict=True):
        yield from _fit_row(example, one, spec, ledger)


def _book_kept(block: Block, examples: Sequence[Example], ledger: Ledger) -> None:
    """Books sequences as `fit` does where nothing has to be done to them."""
    num_supervised = int(block.num_supervised().sum())
    ledger.num_sequences += len(block)
    ledger.rendered_tokens += len(block.ids)
    ledger.lengths.update(block.lengths.tolist())
    ledger.num_kept += len(block)
    ledger.supervised_tokens += num_supervised
    ledger.context_tokens += len(block.ids) - num_supervised
    for notes, example in zip(block.notes, examples, strict=True):
        if notes or example.notes:
            for note in (*notes, *example.notes):
                ledger.note(note, example.origin)


def _fit_row(
    example: Example, rendered: TokenSequence | RowRefused, spec: DataSpec, ledger: Ledger
) -> Iterator[TokenSequence]:
    if isinstance(rendered, RowRefused):
        ledger.drop(rendered.reason, example.origin, rendered.detail)
        return
    for one in fit(example, rendered, spec, ledger):
        ledger.num_sequences += 1
        yield one


def fit(
    example: Example, sequence: TokenSequence, spec: DataSpec, ledger: Ledger
) -> list[TokenSequence]:
    """Fit one sequence to max_length; books it whichever way that goes."""
    length, origin = len(sequence.input_ids), sequence.origin
    ledger.rendered_tokens += length
    ledger.lengths[length] += 1
    if not sequence.num_supervised:
        ledger.drop(NOTHING_SUPERVISED, origin, num_tokens=length)
        return []
    if length <= spec.max_length:
        kept = [sequence]
    elif isinstance(example, PlainText) or spec.overlength == "split":
        kept = _split(sequence, spec.max_length, ledger)
    elif spec.overlength == "truncate":
        kept = _truncate(sequence, spec.max_length, ledger)
        if not kept:
            ledger.drop(NOTHING_LEFT, origin, num_tokens=length)
            return []
    else:
        ledger.drop(OVERLENGTH, origin, f"{length:,} tokens", length)
        return []
    ledger.num_kept += 1
    for note in (*sequence.notes, *example.notes):
        ledger.note(note, origin)
    for one in kept:
        num_supervised = one.num_supervised
        ledger.supervised_tokens += num_supervised
        ledger.context_tokens += len(one.labels) - num_supervised
    return kept


def _truncate(sequence: TokenSequence, max_length: int, ledger: Ledger) -> list[TokenSequence]:
    """The beginning of a sequence; nothing where no token of it would be supervised."""
    origin = sequence.origin
    labels = sequence.labels
    cut = TokenSequence(sequence.input_ids[:max_length], labels[:max_length], origin)
    if not cut.num_supervised:
        return []
    ledger.truncated += 1
    ledger.cut_tokens += len(labels) - max_length
    ledger.example(TRUNCATED, f"{origin} ({len(labels):,} tokens)")
    if IGNORE_INDEX not in labels[max_length - 1 : max_length + 1]:
        ledger.ends_cut += 1
        ledger.example(END_CUT, origin)
    return [cut]


def _split(sequence: TokenSequence, max_length: int, ledger: Ledger) -> list[TokenSequence]:
    """Pieces that each begin with the last token of the one before, as context.

    So every token but the very first is predicted once. A piece in which nothing is supervised
    is cut.
    """
    ledger.split += 1
    pieces = []
    for start in range(0, len(sequence.input_ids) - 1, max_length - 1):
        end = start + max_length
        labels = (IGNORE_INDEX, *sequence.labels[start + 1 : end])
        piece = TokenSequence(sequence.input_ids[start:end], labels, sequence.origin)
        ledger.repeated_tokens += int(start > 0)
        if piece.num_supervised:
            pieces.append(piece)
        else:
            ledger.cut_tokens += len(labels)
    return pieces
