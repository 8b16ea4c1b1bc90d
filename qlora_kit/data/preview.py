"""The figures of a preview: lengths, and what packing saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qlora_kit.data.pack import pack
from qlora_kit.data.pieces import Shown, show
from qlora_kit.data.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.ledger import Ledger
    from qlora_kit.data.prepare import Part
    from qlora_kit.recipe import Recipe
    from qlora_kit.recipe.data import PartName

Sampling = Literal["random", "sequential", "group_by_length"]

_NUM_BINS = 16


@dataclass(frozen=True, slots=True)
class LengthBin:
    """How many rows have from `first` to `last` tokens, both included."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Lengths:
    """Tokens per row as rendered, before any was dropped, cut or split for its length."""

    num_rows: int
    mean: float
    p50: int
    p90: int
    p99: int
    longest: int
    num_longer: int
    """Rows longer than `max_length`."""
    max_length: int
    bins: tuple[LengthBin, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "bins": [[one.first, one.last, one.count] for one in self.bins]}


@dataclass(frozen=True)
class Packing:
    """Tokens that one pass computes, padding included, when it is packed and when it is not."""

    num_sequences: int
    num_tokens: int
    batch_size: int
    padded_tokens: int
    num_packed: int
    """Sequences of up to max_length that they are packed into."""
    packed_tokens: int
    num_batches: int
    num_packed_batches: int

    @property
    def share_saved(self) -> float:
        """Of the tokens of padded batches; below 0 where packing costs more."""
        return 1 - self.packed_tokens / self.padded_tokens

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "share_saved": self.share_saved}


@dataclass(frozen=True)
class PartView:
    """One part of the data as a person sees it; `fault` is why a run would not start."""

    name: PartName
    ledger: Ledger
    lengths: Lengths | None
    """None where no row could be rendered."""
    fault: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "schemas": self.ledger.schemas,
            "ledger": self.ledger.as_dict(),
            "findings": self.ledger.findings(),
            "lengths": self.lengths.as_dict() if self.lengths else None,
            "fault": self.fault,
        }


@dataclass(frozen=True)
class Preview:
    """Everything that `qlora-kit data` shows."""

    title: str
    parts: tuple[PartView, ...]
    packing: Packing | None
    """None where nothing is left to train on."""
    is_packed: bool
    """Whether the recipe packs."""
    examples: tuple[Shown, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(part.fault for part in self.parts if part.fault)

    def as_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.title,
            **{part.name: part.as_dict() for part in self.parts},
            "packing": self.packing.as_dict() if self.packing else None,
            "examples": [one.as_dict() for one in self.examples],
        }


def make_preview(
    title: str,
    recipe: Recipe,
    parts: Mapping[PartName, tuple[Part, str | None]],
    tokenizer: PreTrainedTokenizerBase,
    num_examples: int,
) -> Preview:
    """The figures of prepared parts; each comes with why it would stop a run, or None."""
    views = tuple(
        PartView(
            name, part.ledger, measure_lengths(part.ledger.lengths, recipe.data.max_length), fault
        )
        for name, (part, fault) in parts.items()
    )
    train = parts["train"][0].sequences
    shown = [show(train[number], tokenizer) for number in spread(len(train), num_examples)]
    packing = None
    if len(train):
        packing = measure_packing(
            lengths_of(train),
            recipe.data.max_length,
            recipe.train.per_device_train_batch_size,
            recipe.train.train_sampling_strategy,
            recipe.train.seed,
        )
    return Preview(title, views, packing, recipe.data.packing, tuple(shown))


def lengths_of(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Tokens of each, shape (n,); of stored sequences without reading them."""
    stored = getattr(sequences, "lengths", None)
    if stored is not None:
        return np.asarray(stored)
    return np.fromiter((one.num_tokens for one in sequences), np.int64, len(sequences))


def spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spaced from the first to the last."""
    if count >= total:
        return list(range(total))
    return [number * (total - 1) // max(count - 1, 1) for number in range(count)]


def measure_lengths(counts: Mapping[int, int], max_length: int) -> Lengths | None:
    """Percentiles (nearest rank) and histogram; None where there is no row.

    Args:
        counts: tokens → how many rows have that many.
    """
    if not counts:
        return None
    lengths = np.array(sorted(counts))
    rows = np.array([counts[length] for length in lengths.tolist()])
    below = np.cumsum(rows)
    num_rows = int(below[-1])

    def percentile(share: float) -> int:
        return int(lengths[np.searchsorted(below, share * num_rows)])

    return Lengths(
        num_rows=num_rows,
        mean=float(lengths @ rows) / num_rows,
        p50=percentile(0.5),
        p90=percentile(0.9),
        p99=percentile(0.99),
        longest=int(lengths[-1]),
        num_longer=int(rows[lengths > max_length].sum()),
        max_length=max_length,
        bins=_histogram(lengths, rows, percentile(0.99), max_length),
    )


def _histogram(
    lengths: np.ndarray, rows: np.ndarray, most: int, max_length: int
) -> tuple[LengthBin, ...]:
    """Bins of one width up to `most`, and one for what is beyond; max_length ends a bin."""
    first, last = int(lengths[0]), int(lengths[-1])
    width = _round_width((most - first + 1) / _NUM_BINS)
    start = (first - 1) // width * width
    ends = set(range(start + width, most + width, width)) | {last}
    if start < max_length < last:
        ends.add(max_length)
    bins = []
    for end in sorted(one for one in ends if one <= last):
        inside = (lengths > start) & (lengths <= end)
        bins.append(LengthBin(start + 1, end, int(rows[inside].sum())))
        start = end
    return tuple(bins)


def _round_width(least: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 …"""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10


def measure_packing(
    lengths: np.ndarray, max_length: int, batch_size: int, sampling: Sampling, seed: int
) -> Packing:
    """What one pass computes, with every batch padded to its longest.

    Args:
        lengths: tokens of each sequence, shape (n,), n ≥ 1, none above `max_length`.
        sampling: the recipe's order of rows. A random one is drawn from `seed`: as good as that
            of a run, but not the same.
    """
    bins = pack(lengths, max_length)
    packed = np.add.reduceat(lengths[bins.members], bins.starts[:-1])
    return Packing(
        num_sequences=len(lengths),
        num_tokens=int(lengths.sum()),
        batch_size=batch_size,
        padded_tokens=_computed(lengths, batch_size, sampling, seed),
        num_packed=len(bins),
        packed_tokens=_computed(packed, batch_size, sampling, seed),
        num_batches=-(-len(lengths) // batch_size),
        num_packed_batches=-(-len(bins) // batch_size),
    )


def _computed(lengths: np.ndarray, batch_size: int, sampling: Sampling, seed: int) -> int:
    order = _sampled(lengths, batch_size, sampling, np.random.default_rng(seed))
    starts = np.arange(0, len(order), batch_size)
    longest = np.maximum.reduceat(lengths[order], starts)
    sizes = np.diff(starts, append=len(order))
    return int(longest @ sizes)


def _sampled(
    lengths: np.ndarray, batch_size: int, sampling: Sampling, random: np.random.Generator
) -> np.ndarray:
    """The order in which a sampler of the Trainer goes through the sequences.

    By length it sorts stretches of a random order, each of at most 50 batches and a quarter of
    the whole (transformers, `get_length_grouped_indices`).
    """
    if sampling == "sequential":
        return np.arange(len(lengths))
    order = random.permutation(len(lengths))
    if sampling == "random":
        return order
    stretch = batch_size * max(min(len(lengths) // (batch_size * 4), 50), 1)
    pieces = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    return np.concatenate([one[np.argsort(-lengths[one], kind="stable")] for one in pieces])
