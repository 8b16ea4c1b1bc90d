"""Sequences that are rendered while training, for data that do not fit the disk."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, count, islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pack import PackedSequence, pack
from qlora_kit.data.sequences import TokenSequence

BUFFER_SEQUENCES = 4096
"""How many are held at once: within these the order is random, and packing is by best fit."""

READ_AHEAD = "read ahead of a stream, not trained"
_MARKS = 2  # a loader may have asked for the update behind the one that a checkpoint is of


@dataclass
class Pass:
    """A pass under way: where its rows are booked, and from where it can be gone on with.

    That is the chunk of rows under way: what was read before it need not be rendered again.
    """

    read: Ledger = field(default_factory=Ledger)
    """Of rows as they are read, which every attempt does from the first one on."""
    fitted: Ledger = field(default_factory=Ledger)
    """Of rows as they are rendered and fitted, which is done from the chunk on."""
    num_rows: int = 0
    """Rows rendered before the chunk."""
    num_sequences: int = 0
    """Sequences that came of them."""
    fitted_before: str = ""
    """`fitted` before the chunk, as JSON."""

    def begin_chunk(self, num_rows: int, num_sequences: int) -> None:
        self.num_rows, self.num_sequences = num_rows, num_sequences
        self.fitted_before = json.dumps(self.fitted.state())

    def booked(self) -> Ledger:
        """Both ledgers in one."""
        both = Ledger()
        both.add(self.read)
        both.add(self.fitted)
        return both


OnePass = Callable[[Pass], Iterator[TokenSequence]]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Sequences that were held at once, and the chunk that the first of them is from."""

    num_items: int
    num_rows: int
    """As in `Pass`."""
    num_sequences: int


@dataclass
class Given:
    """What was given of the first pass."""

    num_rows: int = 0
    """Those of the buffers before."""
    num_tokens: int = 0
    num_supervised: int = 0
    last: str = ""
    """The row that the last sequence of those is of; more of it may follow."""
    origins: set[str] = field(default_factory=set)
    """Rows of the buffer under way, and maybe the one before."""

    @property
    def all_rows(self) -> int:
        return self.num_rows + len(self.origins - {self.last})

    def add(self, item: TokenSequence | PackedSequence) -> None:
        for part in item.parts if isinstance(item, PackedSequence) else (item,):
            self.origins.add(part.origin)
            self.num_tokens += part.num_tokens
            self.num_supervised += part.num_supervised

    def end_buffer(self, last: str) -> None:
        self.num_rows, self.last, self.origins = self.all_rows, last, set()


@dataclass(frozen=True)
class Mark:
    """What was booked of the first pass before one of its buffers."""

    buffer: int
    fitted: str
    given: dict[str, Any]


class StreamedSequences(IterableDataset[TokenSequence | PackedSequence]):
    """Pass after pass without end, each in another order that the seed decides.

    The first pass is booked in the ledger as far as it comes. Every pass reads the same rows, so
    the buffers of one are those of all, but for the order in each.
    """

    def __init__(
        self,
        one_pass: OnePass,
        ledger: Ledger,
        seed: int,
        capacity: int | None = None,
        key: str = "",
    ):
        """`key` stands for everything that decides which sequences there are."""
        self._one_pass = one_pass
        self._ledger = ledger
        self._seed = seed
        self._capacity = capacity
        self._key = key
        self._fitted = Ledger()
        """Of the first pass; in `_ledger` when that is over."""
        self._given = Given()
        self._buffers: list[Buffer] = []
        """Of a pass, as far as one has come."""
        self._is_first_over = False
        """Whether the first pass is, and so those are all of them."""
        self._marks: deque[Mark] = deque(maxlen=_MARKS)

    def packed(self, capacity: int) -> StreamedSequences:
        """The same, packed into sequences of `capacity` tokens."""
        return StreamedSequences(self._one_pass, self._ledger, self._seed, capacity, self._key)

    def __iter__(self) -> Iterator[TokenSequence | PackedSequence]:
        return self._items_from(0, 0)

    def starting_at(
        self, num_given: int, place: dict[str, Any] | None = None
    ) -> Iterator[TokenSequence | PackedSequence]:
        """What follows the first `num_given`.

        Without a `place`, which an earlier attempt had from `place_of`, those are read and rendered
        again: what they were decides which rows are duplicates, how those behind them are packed,
        and the ledger. With it, whole passes are left out, and of the one under way the rows before
        the buffer are read alone, for which of them are duplicates.
        """
        number, buffer = self._put_back(place or {}, num_given)
        passed = number * self._ends[-1] if number else 0
        passed += sum(one.num_items for one in self._buffers[:buffer])
        given = self._items_from(number, buffer)
        deque(islice(given, num_given - passed), maxlen=0)
        return given

    def place_of(self, num_given: int) -> dict[str, Any] | None:
        """What `starting_at` needs, as values of JSON; None where it is to begin at the start."""
        place: dict[str, Any] = {
            "key": self._key,
            "capacity": self._capacity,
            "buffers": [[one.num_items, one.num_rows, one.num_sequences] for one in self._buffers],
        }
        if self._is_first_over and num_given > self._ends[-1]:
            return {**place, "ledger": self._ledger.state()}
        ends = [0, *self._ends]
        for mark in reversed(self._marks):
            if ends[mark.buffer] < num_given:
                return {**place, "first_pass": {**asdict(mark), "fitted": json.loads(mark.fitted)}}
        return None

    @property
    def _ends(self) -> list[int]:
        """How many items come up to the end of each buffer."""
        return list(accumulate(one.num_items for one in self._buffers))

    def _put_back(self, place: dict[str, Any], num_given: int) -> tuple[int, int]:
        """The pass and the buffer to begin with; the first ones where the place is of other
        sequences, or behind `num_given`.
        """
        if (place.get("key"), place.get("capacity")) != (self._key, self._capacity):
            return 0, 0
        buffers, mark = [Buffer(*one) for one in place["buffers"]], place.get("first_pass")
        ends = [0, *accumulate(one.num_items for one in buffers)]
        if num_given <= ends[mark["buffer"] if mark else -1]:
            return 0, 0
        self._buffers = buffers
        if mark:
            self._fitted = Ledger.from_state(mark["fitted"])
            self._given = Given(**mark["given"])
            return 0, mark["buffer"]
        self._ledger.add(Ledger.from_state(place["ledger"]))
        self._is_first_over = True
        number, rest = divmod(num_given, ends[-1])
        return number, bisect_right(ends, rest) - 1

    def settle(self) -> None:
        """Book what was read ahead in the first pass, and not given any more."""
        ledger = self._ledger
        ledger.add(self._fitted)
        self._fitted = Ledger()
        flying = ledger.num_rows - ledger.num_kept
        flying -= sum(ledger.dropped.values()) + sum(ledger.set_aside.values())
        if flying:
            ledger.set_aside[READ_AHEAD] += flying
        if not self._is_first_over:
            given = self._given
            ledger.leave_out(
                READ_AHEAD,
                ledger.num_kept - given.all_rows,
                ledger.supervised_tokens - given.num_supervised,
                ledger.context_tokens - (given.num_tokens - given.num_supervised),
            )
        ledger.set_aside += Counter()  # drops what came to nothing
        ledger.check_balance()

    def _items_from(self, number: int, first: int) -> Iterator[TokenSequence | PackedSequence]:
        """From a buffer of a pass on."""
        yield from self._one_pass_from(number, first)
        for later in count(number + 1):
            yield from self._one_pass_from(later, 0)

    def _one_pass_from(self, number: int, first: int) -> Iterator[TokenSequence | PackedSequence]:
        random = np.random.default_rng([self._seed, number])
        for one in self._buffers[:first]:
            random.permutation(one.num_items)
        at = Pass(self._ledger, self._fitted) if number == 0 else Pass()
        sequences = self._sequences_from(at, first)
        for buffer in count(first):
            if number == 0:
                self._mark(buffer, at)
            num_rows, num_sequences = at.num_rows, at.num_sequences
            held = list(islice(sequences, BUFFER_SEQUENCES))
            if not held:
                break
            items = self._items(held)
            if buffer == len(self._buffers):
                self._buffers.append(Buffer(len(items), num_rows, num_sequences))
            for place in random.permutation(len(items)).tolist():
                if number == 0:
                    self._given.add(items[place])
                yield items[place]
            if number == 0:
                self._given.end_buffer(held[-1].origin)
        if number == 0:
            self._ledger.add(self._fitted)
            self._fitted, self._is_first_over = Ledger(), True

    def _sequences_from(self, at: Pass, first: int) -> Iterator[TokenSequence]:
        """Those of a buffer and all behind it."""
        begun = self._buffers[first] if first else Buffer(0, 0, 0)
        at.begin_chunk(begun.num_rows, begun.num_sequences)
        sequences = self._one_pass(at)
        num_before = first * BUFFER_SEQUENCES - begun.num_sequences
        deque(islice(sequences, num_before), maxlen=0)
        return sequences

    def _mark(self, buffer: int, at: Pass) -> None:
        given = {name: one for name, one in asdict(self._given).items() if name != "origins"}
        self._marks.append(Mark(buffer, at.fitted_before, given))

    def _items(self, buffer: list[TokenSequence]) -> list[TokenSequence] | list[PackedSequence]:
        if self._capacity is None:
            return buffer
        lengths = np.array([one.num_tokens for one in buffer])
        bins = pack(lengths, self._capacity)
        return [
            PackedSequence(tuple(buffer[int(member)] for member in bins[number]))
            for number in range(len(bins))
        ]
