"""What becomes of a sequence that is longer than max_length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.data.examples import Example, PlainText
from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger
from qlora_kit.data.render import IGNORE_INDEX, TokenSequence

if TYPE_CHECKING:
    from qlora_kit.recipe import DataSpec

OVERLENGTH = "longer than max_length"
NOTHING_SUPERVISED = "nothing supervised"
NOTHING_LEFT = "nothing supervised before max_length"


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
