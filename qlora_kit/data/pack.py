"""Packing: several short sequences into one of max_length, by best-fit decreasing.

Best-fit decreasing puts each sequence, the longest first, into the fullest bin that still has
room, and opens a new bin where none has (Johnson 1973; at most 11/9 of the fewest bins possible,
and 6/9 of one). A segment tree over the room that is left finds that bin in O(log max_length),
as in Ding et al. 2024 (arXiv:2404.10830).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np

from qlora_kit.data.sequences import TokenSequence


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Several sequences that are trained on as one; none of them sees another."""

    parts: tuple[TokenSequence, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(part.input_ids) for part in self.parts)

    @property
    def num_supervised(self) -> int:
        return sum(part.num_supervised for part in self.parts)


@dataclass(frozen=True)
class Bins:
    """Which sequences share a bin: `members[starts[b]:starts[b + 1]]` for bin b."""

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.members[self.starts[number] : self.starts[number + 1]]


class PackedSequences(Sequence[PackedSequence]):
    """Packed views of sequences, put together when they are asked for."""

    def __init__(self, sequences: Sequence[TokenSequence], bins: Bins, lengths: np.ndarray):
        """`lengths` are the tokens of each sequence, shape (len(sequences),)."""
        self._sequences = sequences
        self._bins = bins
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def example_lengths(self) -> np.ndarray:
        """Tokens of each of the sequences that were packed."""
        return self._lengths

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each packed sequence; int64 of shape (len(self),)."""
        members = self._lengths[self._bins.members]
        sums = np.concatenate([[0], np.cumsum(members, dtype=np.int64)])
        return np.diff(sums[self._bins.starts])

    @overload
    def __getitem__(self, item: int) -> PackedSequence: ...

    @overload
    def __getitem__(self, item: slice) -> Sequence[PackedSequence]: ...

    def __getitem__(self, item: int | slice) -> PackedSequence | Sequence[PackedSequence]:
        if isinstance(item, slice):
            return [self[number] for number in range(*item.indices(len(self)))]
        number = range(len(self))[item]
        return PackedSequence(tuple(self._sequences[int(one)] for one in self._bins[number]))


def pack(lengths: np.ndarray, capacity: int) -> Bins:
    """Best-fit decreasing.

    Args:
        lengths: tokens of each sequence, shape (n,), each from 1 to `capacity`.

    The order of bins is that of their first sequences' lengths; within a bin the longest is
    first. Sequences of the same length keep their order, so the result depends on nothing else.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= capacity)
    rooms = _Rooms(capacity)
    bins: list[list[int]] = []
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=1)
    done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        while done < end:
            found = rooms.take(length)
            if found is None:
                found = len(bins)
                bins.append([])
                room = capacity
            else:
                room = rooms.room_taken
            # There was no tighter bin, so for the next of this length it is the best one again.
            num_fitting = min(room // length, end - done)
            bins[found] += order[done : done + num_fitting].tolist()
            rooms.give(room - num_fitting * length, found)
            done += num_fitting
    sizes = np.fromiter(map(len, bins), np.int64, len(bins))
    members = np.fromiter(chain.from_iterable(bins), np.int64, len(lengths))
    return Bins(members, np.concatenate([[0], np.cumsum(sizes)]))


class _Rooms:
    """Bins by the room they have left; finds one with the least room that is enough."""

    def __init__(self, capacity: int):
        self._size = 1 << capacity.bit_length()
        self._filled = bytearray(2 * self._size)
        """A binary tree over rooms: whether some bin below a node has that room."""
        self._bins: list[list[int]] = [[] for _ in range(capacity + 1)]
        self.room_taken = 0

    def give(self, room: int, number: int) -> None:
        if room == 0:
            return
        self._bins[room].append(number)
        node = self._size + room
        while node and not self._filled[node]:
            self._filled[node] = 1
            node >>= 1

    def take(self, least: int) -> int | None:
        """A bin with the smallest room of at least `least`; its room is then `room_taken`."""
        node = self._size + least
        while not self._filled[node]:
            # Up until there is a filled subtree to the right, then down its left edge.
            while node & 1 or not self._filled[node + 1]:
                node >>= 1
                if node <= 1:
                    return None
            node += 1
            while node < self._size:
                node = 2 * node if self._filled[2 * node] else 2 * node + 1
        room = node - self._size
        number = self._bins[room].pop()
        self.room_taken = room
        if not self._bins[room]:
            self._filled[node] = 0
            node >>= 1
            while node and not (self._filled[2 * node] or self._filled[2 * node + 1]):
                self._filled[node] = 0
                node >>= 1
        return number
