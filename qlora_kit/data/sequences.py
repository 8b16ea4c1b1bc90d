"""Token ids and labels: of one example, and of many in flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qlora_kit.data.rows import RowRefused

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One rendered example.

    `labels[i]` is `input_ids[i]` where token i is supervised, else IGNORE_INDEX. Nothing
    predicts the first token, so it never is. `notes` say what a person should know of the row.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        first = self.labels[:1]
        ignored = self.labels.count(IGNORE_INDEX)
        return len(self.labels) - ignored - len(first) + first.count(IGNORE_INDEX)


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences one behind the other. What is done to all of them at once takes a tenth of the
    time that it takes one by one.

    `ids` (int32) and `supervised` (bool) have an entry for each token; sequence n ends before
    token `ends[n]`.
    """

    ids: np.ndarray
    supervised: np.ndarray
    ends: np.ndarray
    origins: Sequence[str]
    notes: Sequence[tuple[str, ...]]

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> Block:
        ids, ends = flat([one.input_ids for one in sequences])
        labels, _ = flat([one.labels for one in sequences])
        origins = [one.origin for one in sequences]
        return cls(ids, labels != IGNORE_INDEX, ends, origins, [one.notes for one in sequences])

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """At least one block."""
        return cls(
            np.concatenate([one.ids for one in blocks]),
            np.concatenate([one.supervised for one in blocks]),
            np.cumsum(np.concatenate([one.lengths for one in blocks])),
            [origin for one in blocks for origin in one.origins],
            [notes for one in blocks for notes in one.notes],
        )

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> np.ndarray:
        """The first token of each sequence; int64 of shape (len(self),)."""
        starts: np.ndarray = self.ends - self.lengths
        return starts

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence; int64 of shape (len(self),)."""
        return np.diff(self.ends, prepend=0)

    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of each sequence, its first aside; int64 of shape (len(self),)."""
        counts = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        after_first = np.minimum(self.starts + 1, self.ends)
        found: np.ndarray = counts[self.ends] - counts[after_first]
        return found

    def sequence(self, number: int) -> TokenSequence:
        start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
        ids = self.ids[start:end]
        labels = np.where(self.supervised[start:end], ids, IGNORE_INDEX)
        origin, notes = self.origins[number], self.notes[number]
        return TokenSequence(tuple(ids.tolist()), tuple(labels.tolist()), origin, notes)

    def run(self, first: int, end: int) -> Block:
        """Sequences `first` up to `end`, which is left out."""
        start = int(self.ends[first - 1]) if first else 0
        stop = int(self.ends[end - 1]) if end else 0
        return Block(
            self.ids[start:stop],
            self.supervised[start:stop],
            self.ends[first:end] - start,
            self.origins[first:end],
            self.notes[first:end],
        )


@dataclass(frozen=True, slots=True)
class Rendered:
    """What examples were rendered to, in order. One that was refused is empty in the block."""

    block: Block
    refused: Mapping[int, RowRefused]

    def __getitem__(self, number: int) -> TokenSequence | RowRefused:
        refused = self.refused.get(number)
        return self.block.sequence(number) if refused is None else refused

    def __iter__(self) -> Iterator[TokenSequence | RowRefused]:
        return (self[number] for number in range(len(self.block)))


def flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All ids one behind the other (int32), and where each row ends (int64)."""
    ends = np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))
    num_tokens = int(ends[-1]) if len(ends) else 0
    return np.fromiter(chain.from_iterable(rows), np.int32, num_tokens), ends
