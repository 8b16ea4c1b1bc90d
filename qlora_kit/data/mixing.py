"""In which order sequences of several sources are trained on, and how many of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from qlora_kit.data.ledger import Ledger
    from qlora_kit.data.store import StoredSequences
    from qlora_kit.recipe import DataSpec, SourceSpec


NOT_DRAWN = "not drawn in a pass (num_rows, mix)"


def book_draws(sequences: StoredSequences, order: np.ndarray, ledger: Ledger) -> None:
    """What of the kept rows one pass does not come to, and what it has more than once."""
    times = np.bincount(order, minlength=len(sequences))
    lengths = sequences.lengths
    ledger.redrawn_tokens = int((np.maximum(times - 1, 0) * lengths).sum())
    left = times == 0
    if left.any():
        rows, supervised = sequences.rows(), int(sequences.supervised()[left].sum())
        num_rows = len(np.setdiff1d(rows[left], rows[~left]))
        ledger.leave_out(NOT_DRAWN, num_rows, supervised, int(lengths[left].sum()) - supervised)


def training_order(sources: np.ndarray, spec: DataSpec) -> np.ndarray:
    """Which sequences make one pass, in order.

    Args:
        sources: for each sequence the number of its source in `data.train`, shape (n,).

    Returns:
        Indices into those sequences, int64. The same recipe always gives the same.
    """
    draws = [
        _draw(np.flatnonzero(sources == number), source, spec.seed + number)
        for number, source in enumerate(spec.train)
    ]
    if spec.mix == "concatenate":
        return np.concatenate(draws)
    weights = np.array([source.weight or 1.0 for source in spec.train])
    return _interleave(draws, weights / weights.sum(), spec.mix == "all_exhausted", spec.seed)


def _draw(members: np.ndarray, source: SourceSpec, seed: int) -> np.ndarray:
    """All of a source in its order; or num_rows of it, shuffled, each as often as any other ± 1."""
    if source.num_rows is None or not len(members):
        return members
    random = np.random.default_rng(seed)
    passes = -(-source.num_rows // len(members))
    drawn = np.concatenate([random.permutation(members) for _ in range(passes)])
    return drawn[: source.num_rows]


def _interleave(
    draws: Sequence[np.ndarray], shares: np.ndarray, until_all: bool, seed: int
) -> np.ndarray:
    """Draw from one source after the other by their shares, each in its order.

    Ends when the first of them has nothing left; or with `until_all` when each has given
    everything at least once, those that end before starting again.
    """
    shares = np.where([len(one) > 0 for one in draws], shares, 0.0)
    if not shares.any():
        return np.empty(0, np.int64)
    taken = np.zeros(len(draws), np.int64)
    sizes = np.array([len(one) for one in draws])
    order: list[int] = []
    for number in _choices(shares / shares.sum(), seed):
        if not until_all and taken[number] == sizes[number]:
            break
        order.append(int(draws[number][taken[number] % sizes[number]]))
        taken[number] += 1
        if until_all and (taken >= sizes).all():
            break
    return np.array(order, np.int64)


def _choices(shares: np.ndarray, seed: int) -> Iterator[int]:
    random = np.random.default_rng(seed)
    while True:
        yield from random.choice(len(shares), size=4096, p=shares).tolist()
