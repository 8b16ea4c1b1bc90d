"""Finding answers by counting the openings before them, in many sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.sequences import Block, flat

if TYPE_CHECKING:
    from qlora_kit.data.mark import Marked


@dataclass(frozen=True, slots=True)
class Turn:
    """How an answer's turn begins and ends, in tokens."""

    opening: Sequence[int]
    end_id: int


def count_answers(
    marked: Sequence[Marked], ids: Sequence[Sequence[int]], turn: Turn
) -> tuple[Block, np.ndarray]:
    """The sequences with their answers supervised, and where that could be done.

    An answer begins behind the opening that has as many before it in its row as
    `Marked.openings` says, and goes on to the next end of a turn. Where a row has no such
    opening, or its tokens are others than at the end of a prompt, the second is False.

    Returns:
        A block of all rows, and bool of shape (len(marked),).
    """
    tokens, ends = flat(ids)
    origins, notes = [one.origin for one in marked], [one.notes for one in marked]
    block = Block(tokens, np.zeros(len(tokens), np.bool_), ends, origins, notes)
    rows = np.repeat(np.arange(len(marked)), [len(one.openings) for one in marked])
    wanted = np.fromiter((n for one in marked for n in one.openings), np.int64, len(rows))
    first, past = _found(tokens, turn.opening[0], block.starts[rows], wanted)
    starts = first + len(turn.opening)
    is_opened = ~past
    padded = np.append(tokens, -1)
    for offset, token in enumerate(turn.opening):
        is_opened &= padded.take(first + offset, mode="clip") == token
    last, past = _found(tokens, turn.end_id, starts, np.zeros_like(wanted))
    is_answer = is_opened & ~past & (last < ends[rows])
    edges = np.zeros(len(tokens) + 1, np.int32)
    np.add.at(edges, starts[is_answer], 1)
    np.add.at(edges, last[is_answer] + 1, -1)
    np.greater(np.cumsum(edges[:-1]), 0, out=block.supervised)
    are_found = np.ones(len(marked), np.bool_)
    are_found[rows[~is_answer]] = False
    return block, are_found


def _found(
    tokens: np.ndarray, token: int, starts: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Where a token stands for the n-th time from a place on, and where it does not, as bool."""
    places = np.flatnonzero(tokens == token)
    index = np.searchsorted(places, starts) + number
    past = index >= len(places)
    places = np.append(places, len(tokens))
    return places[np.minimum(index, len(places) - 1)], past
