"""Orders compared: Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing theirs; 0 where one of them is constant."""
    assert len(one) == len(other) >= 2, "two rankings of the same things are compared"
    first, second = _ranks(one), _ranks(other)
    first -= first.mean()
    second -= second.mean()
    norm = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / norm if norm else 0.0


def _ranks(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: np.ndarray = (ends - (counts - 1) / 2)[inverse]
    return ranks


def spread(values: Sequence[float], count: int) -> list[int]:
    """Indices of `count` values over the whole range, from the smallest to the largest."""
    order = sorted(range(len(values)), key=values.__getitem__)
    if count >= len(order):
        return order
    if count == 1:
        return [order[-1]]
    return [order[round(i * (len(order) - 1) / (count - 1))] for i in range(count)]
