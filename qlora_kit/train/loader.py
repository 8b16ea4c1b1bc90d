"""From an order of items to the micro-batches that one process trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from qlora_kit.data.collate import Batch
from qlora_kit.data.pack import PackedSequence, PackedSequences
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.data.store import StoredSequences
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.train.order import TrainOrder, micro_batches

Item = TokenSequence | PackedSequence
AnyCollator = Callable[[Sequence[Any]], Batch]
"""A Collator or an IsolatingCollator."""


@dataclass(frozen=True)
class BatchShape:
    """How an update of `items_per_update` items is shared out."""

    per_device: int
    accumulation: int
    num_processes: int = 1
    rank: int = 0

    @property
    def items_per_update(self) -> int:
        return self.per_device * self.accumulation * self.num_processes


class Items(Protocol):
    """Where the items of every update come from."""

    def updates(self, start: int) -> Iterator[Sequence[Item]]:
        """The items of each update, from update number `start` on."""
        ...

    def place(self, update: int) -> dict[str, Any] | None:
        """Where they stand before an update, as values of JSON; None where its number says it."""
        ...


@dataclass(frozen=True)
class OrderedItems:
    """Items that can be gone to directly."""

    items: Sequence[Item]
    order: TrainOrder

    def updates(self, start: int) -> Iterator[Sequence[Item]]:
        update = start
        while True:
            yield [self.items[index] for index in self.order.items_of(update)]
            update += 1

    def place(self, update: int) -> None:
        return None


@dataclass(frozen=True)
class StreamedItems:
    """Items that come as they are read."""

    stream: StreamedSequences
    items_per_update: int
    begin: dict[str, Any] | None = None
    """The `place` that an earlier attempt has kept of the update to start with."""

    def updates(self, start: int) -> Iterator[Sequence[Item]]:
        """What comes before `start` is read at once, also where no update follows: the stream
        books what it has given.
        """
        given = self.stream.starting_at(start * self.items_per_update, self.begin)
        return iter(lambda: list(islice(given, self.items_per_update)), [])

    def place(self, update: int) -> dict[str, Any] | None:
        return self.stream.place_of(update * self.items_per_update)


class MicroBatches(IterableDataset[Batch]):
    """Collated micro-batches of one process, from one update to another.

    The first of each update carries, as `update_origins`, the rows of the whole update.
    """

    def __init__(
        self, items: Items, collator: AnyCollator, shape: BatchShape, start: int, end: int
    ):
        self._items = items
        self._collator = collator
        self._shape = shape
        self._start = start
        self._end = end

    def __iter__(self) -> Iterator[Batch]:
        shape = self._shape
        for items in islice(self._items.updates(self._start), self._end - self._start):
            told: list[str] = [origin for item in items for origin in origins_of(item)]
            for places in micro_batches(
                range(len(items)),
                shape.per_device,
                shape.accumulation,
                shape.rank,
                shape.num_processes,
            ):
                mine = [items[place] for place in places]
                batch = collate(mine, self._collator) if mine else self._empty(items[0])
                yield {**batch, "update_origins": told}
                told = []

    def _empty(self, stand_in: Item) -> Batch:
        return empty_batch(stand_in, self._collator)


def origins_of(item: Item) -> tuple[str, ...]:
    """The rows that an item was made of."""
    if isinstance(item, PackedSequence):
        return tuple(part.origin for part in item.parts)
    return (item.origin,)


def lengths_of(items: Sequence[Item]) -> np.ndarray:
    """Tokens of each item; int64 of shape (len(items),)."""
    if isinstance(items, StoredSequences | PackedSequences):
        return items.lengths
    return np.fromiter((item.num_tokens for item in items), np.int64, len(items))


def longest_of(items: Sequence[Item], count: int) -> list[Item]:
    """The longest items, at most `count`."""
    places = np.argsort(-lengths_of(items), kind="stable")[:count]
    return [items[int(place)] for place in places]


def collate(items: Sequence[Item], collator: AnyCollator) -> Batch:
    """A batch that still knows its items, so that it can be divided."""
    return {**collator(items), "items": list(items)}


def empty_batch(stand_in: Item, collator: AnyCollator) -> Batch:
    """A batch of one short sequence that nothing is learned from.

    For a process that has no items left in the last update of a pass: it still has to take part
    in the exchange of gradients.
    """
    part = stand_in.parts[0] if isinstance(stand_in, PackedSequence) else stand_in
    short = replace(part, input_ids=part.input_ids[:2], labels=(IGNORE_INDEX,) * 2)
    batch: dict[str, Any] = {**collator([short]), "items": [], "origins": [], "num_tokens": 0}
    return batch


def divided(batch: Batch, parts: int, collator: AnyCollator) -> list[Batch]:
    """The same items in `parts` batches as even as can be; empty ones are omitted."""
    items = batch["items"]
    if parts == 1 or len(items) < 2:
        return [batch]
    size = -(-len(items) // parts)
    return [collate(items[at : at + size], collator) for at in range(0, len(items), size)]


def data_loader(batches: MicroBatches, pin_memory: bool) -> DataLoader[Batch]:
    """Its generator is its own: a loader draws from the global one on every start, and a resumed
    run starts once more often.
    """
    return DataLoader(batches, batch_size=None, pin_memory=pin_memory, generator=torch.Generator())
