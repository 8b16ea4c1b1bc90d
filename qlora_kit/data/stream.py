"""Sequences that are rendered while training, for data that do not fit the disk."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import IterableDataset

from qlora_kit.data.pack import PackedSequence, pack
from qlora_kit.data.sequences import TokenSequence

if TYPE_CHECKING:
    from qlora_kit.data.ledger import Ledger

BUFFER_SEQUENCES = 4096
"""How many are held at once: within these the order is random, and packing is by best fit."""

READ_AHEAD = "read ahead of a stream, not trained"
OnePass = Callable[["Ledger | None"], Iterator[TokenSequence]]


class StreamedSequences(IterableDataset[TokenSequence | PackedSequence]):
    """Pass after pass without end, each in another order that the seed decides.

    The first pass is booked in the ledger as far as it comes.
    """

    def __init__(self, one_pass: OnePass, ledger: Ledger, seed: int, capacity: int | None = None):
        self._one_pass = one_pass
        self._ledger = ledger
        self._seed = seed
        self._capacity = capacity
        self._rows: set[int] = set()
        self._tokens = self._supervised_tokens = 0

    def packed(self, capacity: int) -> StreamedSequences:
        """The same, packed into sequences of `capacity` tokens."""
        return StreamedSequences(self._one_pass, self._ledger, self._seed, capacity)

    def __iter__(self) -> Iterator[TokenSequence | PackedSequence]:
        for number in count():
            random = np.random.default_rng([self._seed, number])
            sequences = self._one_pass(self._ledger if number == 0 else None)
            while buffer := list(islice(sequences, BUFFER_SEQUENCES)):
                items = self._items(buffer)
                for place in random.permutation(len(items)).tolist():
                    if number == 0:
                        self._given(items[place])
                    yield items[place]

    def starting_at(self, num_given: int) -> Iterator[TokenSequence | PackedSequence]:
        """What follows the first `num_given`, which are read and rendered again: what they were
        decides which rows are duplicates, how those behind them are packed, and the ledger.
        """
        given = iter(self)
        deque(islice(given, num_given), maxlen=0)
        return given

    def settle(self) -> None:
        """Book what was read ahead in the first pass, and not given any more."""
        ledger = self._ledger
        flying = ledger.num_rows - ledger.num_kept
        flying -= sum(ledger.dropped.values()) + sum(ledger.set_aside.values())
        if flying:
            ledger.set_aside[READ_AHEAD] += flying
        ledger.leave_out(
            READ_AHEAD,
            ledger.num_kept - len(self._rows),
            ledger.supervised_tokens - self._supervised_tokens,
            ledger.context_tokens - (self._tokens - self._supervised_tokens),
        )
        ledger.set_aside += Counter()  # drops what came to nothing
        ledger.check_balance()

    def _given(self, item: TokenSequence | PackedSequence) -> None:
        parts = item.parts if isinstance(item, PackedSequence) else (item,)
        for part in parts:
            self._rows.add(hash(part.origin))
            self._tokens += part.num_tokens
            self._supervised_tokens += part.num_supervised

    def _items(self, buffer: list[TokenSequence]) -> list[TokenSequence] | list[PackedSequence]:
        if self._capacity is None:
            return buffer
        lengths = np.array([one.num_tokens for one in buffer])
        bins = pack(lengths, self._capacity)
        return [
            PackedSequence(tuple(buffer[int(member)] for member in bins[number]))
            for number in range(len(bins))
        ]
