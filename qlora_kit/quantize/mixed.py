"""Which layers keep 8 or 16 bits, so that a given number of bytes costs the least quality.

To first order the layers' divergences add up, so this is a knapsack with a choice of widths for
each unit. It is solved greedily along the lower convex hull of every unit's (bytes, KL): what
saves most KL per byte is widened first, which is optimal for every budget that it exactly fills.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_kit.errors import ModelError
from qlora_kit.model.bits import override_matches
from qlora_kit.quantize.rounding import Rounding
from qlora_kit.quantize.sensitivity.units import kind_of

_MIB = 1024**2
_GIB = 1024**3


@dataclass(frozen=True)
class Width:
    """One way to keep a unit."""

    num_bits: int
    num_bytes: int
    kl: float
    """What it is expected to cost, in nats per token."""


@dataclass(frozen=True)
class Options:
    """A unit and the ways to keep it, the narrowest first; wider ones cost less KL."""

    name: str
    modules: tuple[str, ...]
    widths: tuple[Width, ...]


@dataclass(frozen=True)
class Mixture:
    """A width for every unit."""

    bits: Mapping[str, int]
    """By unit."""
    num_bytes: int
    """Of the whole model."""
    expected_kl: float

    @property
    def name(self) -> str:
        """Such as `120 in 4 bits, 90 in 8 bits`."""
        counts = Counter(self.bits.values())
        return ", ".join(f"{count} in {bits} bits" for bits, count in sorted(counts.items()))

    @property
    def is_quantized(self) -> bool:
        """False where all of the model stays in 16 bits."""
        return any(bits != 16 for bits in self.bits.values())

    def widened(self, step: _Step) -> Mixture:
        return Mixture(
            {**self.bits, step.name: step.num_bits},
            self.num_bytes + step.num_bytes,
            max(0.0, self.expected_kl - step.saved_kl),
        )


@dataclass(frozen=True)
class _Step:
    """Widening one unit from one corner of its hull to the next."""

    name: str
    num_bits: int
    num_bytes: int
    saved_kl: float

    @property
    def worth(self) -> float:
        return self.saved_kl / self.num_bytes


def narrowest(units: Sequence[Options], other_bytes: int) -> Mixture:
    """Every unit at its narrowest; `other_bytes` are those of all that is no unit."""
    return Mixture(
        {unit.name: unit.widths[0].num_bits for unit in units},
        other_bytes + sum(unit.widths[0].num_bytes for unit in units),
        sum(unit.widths[0].kl for unit in units),
    )


def widenings(units: Sequence[Options], other_bytes: int) -> list[Mixture]:
    """From everything at its narrowest to everything at its widest, the worthiest step first."""
    mixtures = [narrowest(units, other_bytes)]
    for step in _steps(units):
        mixtures.append(mixtures[-1].widened(step))
    return mixtures


def within_bytes(units: Sequence[Options], other_bytes: int, budget: int) -> Mixture:
    """The least expected KL that the greedy order finds in `budget` bytes.

    A step that does not fit any more is passed over, for smaller ones behind it.

    Raises:
        ModelError: not even the narrowest fits; says what it takes.
    """
    mixture = narrowest(units, other_bytes)
    require_room(mixture.num_bytes, budget)
    stuck: set[str] = set()
    for step in _steps(units):
        if step.name in stuck:
            continue
        if mixture.num_bytes + step.num_bytes > budget:
            stuck.add(step.name)
            continue
        mixture = mixture.widened(step)
    return mixture


def require_room(narrowest_bytes: int, budget: int) -> None:
    """
    Raises:
        ModelError: not even the narrowest mixture fits; says what it takes.
    """
    if narrowest_bytes > budget:
        raise ModelError(
            f"a budget of {size_text(budget)} is less than the {size_text(narrowest_bytes)} that "
            "the model takes with every layer at its narrowest (embeddings and norms stay in 16 "
            "bits); raise it."
        )


def within_kl(
    mixtures: Sequence[Mixture], measure: Callable[[Mixture], float], max_kl: float
) -> Mixture:
    """The smallest of `widenings` whose measured KL is within budget, by halving the range.

    Raises:
        ModelError: not even the widest is.
    """
    low, high = 0, len(mixtures) - 1
    found = measure(mixtures[high])
    if found > max_kl:
        raise ModelError(
            f"the widest mixture is at a KL of {found:.3g}, and the budget is {max_kl:g}; raise it."
        )
    while low < high:
        middle = (low + high) // 2
        if measure(mixtures[middle]) <= max_kl:
            high = middle
        else:
            low = middle + 1
    return mixtures[high]


def overrides_of(mixture: Mixture, units: Iterable[Options], num_bits: int) -> dict[str, int]:
    """`quantization.overrides` of a recipe whose layers have `num_bits` otherwise.

    By full names; a kind of module that is kept in one width throughout is named once.
    """
    bits = {name: mixture.bits[unit.name] for unit in units for name in unit.modules}
    kinds: dict[str, list[str]] = {}
    for name in bits:
        kinds.setdefault(kind_of(name), []).append(name)
    patterns: dict[str, int] = {}
    for kind, names in kinds.items():
        is_one = len({bits[name] for name in names}) == 1 < len(names)
        if is_one and names == [name for name in bits if override_matches(name, kind)]:
            patterns[kind] = bits[names[0]]
        else:
            patterns |= {name: bits[name] for name in names}
    return {pattern: width for pattern, width in patterns.items() if width != num_bits}


def size_text(num_bytes: int) -> str:
    """In GiB, or in MiB where it is less than one."""
    if num_bytes < _GIB:
        return f"{num_bytes / _MIB:,.2f} MiB"
    return f"{num_bytes / _GIB:,.3f} GiB"


def widths_of(
    shapes: Sequence[tuple[int, int]], kls: Mapping[int, float], rounding: Rounding
) -> tuple[Width, ...]:
    """The ways to keep modules of these (out, in) shapes: as `rounding` says, in 8 and in 16 bits.

    kls: by bits; 16 are taken to cost nothing.
    """
    roundings = {rounding.num_bits: rounding, 8: Rounding("int8"), 16: Rounding("none")}
    return tuple(
        Width(
            bits,
            sum(roundings[bits].num_bytes(*shape) for shape in shapes),
            0.0 if bits == 16 else kls[bits],
        )
        for bits in sorted(bits for bits in roundings if bits >= rounding.num_bits)
    )


def _steps(units: Iterable[Options]) -> list[_Step]:
    steps = [step for unit in units for step in _hull(unit)]
    return sorted(steps, key=lambda step: -step.worth)  # stable: of one unit in their order


def _hull(unit: Options) -> list[_Step]:
    """The steps along the lower convex hull: each worth less than the one before it."""
    corners = [unit.widths[0]]
    for width in unit.widths[1:]:
        if width.kl >= corners[-1].kl or width.num_bytes <= corners[-1].num_bytes:
            continue
        while len(corners) > 1 and _worth(corners[-2], width) > _worth(corners[-2], corners[-1]):
            corners.pop()
        corners.append(width)
    return [
        _Step(unit.name, after.num_bits, after.num_bytes - before.num_bytes, before.kl - after.kl)
        for before, after in pairwise(corners)
    ]


def _worth(before: Width, after: Width) -> float:
    return (before.kl - after.kl) / (after.num_bytes - before.num_bytes)
