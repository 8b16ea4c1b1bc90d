"""Which sequences every update trains on: a function of the seed and the update alone.

Neither how many processes share an update nor how many sequences a process takes at once changes
it, and any update can be gone to directly. Passes over the data follow each other without a seam.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.trainer_pt_utils import get_length_grouped_indices

Strategy = Literal["random", "sequential", "group_by_length"]
MicroBatch = tuple[int, ...]


@dataclass(frozen=True)
class TrainOrder:
    """The order of a training part that knows its size.

    The last update of a pass trains on what is left, which may be fewer sequences.
    """

    num_items: int
    items_per_update: int
    strategy: Strategy
    seed: int
    lengths: Sequence[int] = field(default=(), repr=False)
    """Tokens of each item; read by group_by_length alone."""

    @property
    def updates_per_pass(self) -> int:
        return max(math.ceil(self.num_items / self.items_per_update), 1)

    def items_of(self, update: int) -> MicroBatch:
        """Indices of the items of an update, counted from 0."""
        number, place = divmod(update, self.updates_per_pass)
        start = place * self.items_per_update
        order = _pass_order(self, number)[start : start + self.items_per_update]
        return tuple(int(index) for index in order)

    def __hash__(self) -> int:
        return hash((self.num_items, self.items_per_update, self.strategy, self.seed))


@lru_cache(maxsize=2)
def _pass_order(order: TrainOrder, number: int) -> NDArray[np.int64]:
    """Indices of one pass, of shape (num_items,)."""
    if order.strategy == "sequential":
        return np.arange(order.num_items)
    random = torch.Generator().manual_seed(order.seed + number)
    if order.strategy == "random":
        return torch.randperm(order.num_items, generator=random).numpy()
    grouped = get_length_grouped_indices(
        list(order.lengths), order.items_per_update, generator=random
    )
    return np.array(grouped, np.int64)


def micro_batches(
    items: Sequence[int], per_device: int, num_micro_batches: int, rank: int, num_processes: int
) -> Iterator[MicroBatch]:
    """The share of one process in an update: always as many micro-batches, the last maybe empty.

    Each has up to `per_device` items; they are dealt out in turn, so that every process takes
    part in each.
    """
    for number in range(num_micro_batches):
        start = (number * num_processes + rank) * per_device
        yield tuple(items[start : start + per_device])
