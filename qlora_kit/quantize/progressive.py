"""From 16 bits to 8 and on to 4, a few layers at a time, as far as a budget of quality allows.

The layers that are expected to lose least go first. Every step is measured as a whole, not added
up, and the last one within budget is what a recipe is written for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.quantize.mixed import Mixture, Options
from qlora_kit.quantize.mixed_base import (
    Trial,
    options_of,
    require_loadable,
    section_of,
    unquantizable_bytes,
)
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.evaluate.divergence import Divergence
    from qlora_kit.model.base import Base
    from qlora_kit.quantize.sensitivity.measure import Sensitivity
    from qlora_kit.quantize.sensitivity.reference import Reference


@dataclass(frozen=True)
class Stage:
    """One step down, measured."""

    mixture: Mixture
    divergence: Divergence
    holds: bool
    """Whether it is within budget."""

    @property
    def name(self) -> str:
        return self.mixture.name

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_bytes": self.mixture.num_bytes,
            "holds": self.holds,
            "divergence": asdict(self.divergence),
        }


@dataclass(frozen=True)
class Descent:
    """Every stage that was measured, and the section of a recipe for the last that holds."""

    stages: tuple[Stage, ...]
    max_kl: float
    quantization: Mapping[str, Any]

    @property
    def kept(self) -> Stage:
        """The first stage, everything in 16 bits, always holds."""
        return [stage for stage in self.stages if stage.holds][-1]

    def as_dict(self) -> dict[str, Any]:
        return {
            "max_kl": self.max_kl,
            "stages": [stage.as_dict() for stage in self.stages],
            "kept": self.kept.name,
            "quantization": dict(self.quantization),
        }


def descend(
    base: Base,
    found: Sensitivity,
    reference: Reference,
    *,
    max_kl: float,
    num_steps: int = 4,
    reporter: Reporter = SILENT,
) -> Descent:
    """Go down step by step, each width in `num_steps` steps of about as many parameters, until a
    step costs more than `max_kl`, measured on the rows of `reference`.

    Raises:
        ModelError: no recipe can ask for this way to round.
    """
    rounding = found.plan.rounding
    require_loadable(rounding)
    units = options_of(found, base.skeleton)
    sizes = {entry.unit.name: entry.num_parameters for entry in found.entries}
    trial = Trial(reference, units, rounding)
    stages: list[Stage] = []
    ladder = list(_ladder(units, sizes, num_steps, unquantizable_bytes(base.skeleton)))
    with reporter.progress("stepping down", len(ladder)) as progress:
        for mixture in ladder:
            divergence = trial.of(mixture)
            stages.append(Stage(mixture, divergence, divergence.kl_mean <= max_kl))
            progress.update(1, kl=f"{stages[-1].name}: KL {divergence.kl_mean:.3g}")
            if not stages[-1].holds:
                break
    kept = [stage for stage in stages if stage.holds][-1]
    return Descent(tuple(stages), max_kl, section_of(kept.mixture, units, rounding))


def _ladder(
    units: Sequence[Options], sizes: Mapping[str, int], num_steps: int, other_bytes: int
) -> Iterator[Mixture]:
    """Mixtures from all in 16 bits down to all at the narrowest."""
    bits = {unit.name: 16 for unit in units}
    yield _mixture(units, bits, other_bytes)
    for narrow in sorted({w.num_bits for unit in units for w in unit.widths} - {16}, reverse=True):
        kls = {u.name: w.kl for u in units for w in u.widths if w.num_bits == narrow}
        order = sorted(units, key=lambda unit: kls[unit.name])
        for names in _steps([unit.name for unit in order], sizes, num_steps):
            bits |= dict.fromkeys(names, narrow)
            yield _mixture(units, bits, other_bytes)


def _steps(order: Sequence[str], sizes: Mapping[str, int], num_steps: int) -> Iterator[list[str]]:
    """`order` in `num_steps` stretches of about as many parameters each; none is empty."""
    total = sum(sizes[name] for name in order)
    taken, done, step = [], 0, 1
    for name in order:
        taken.append(name)
        done += sizes[name]
        if done * num_steps >= total * step:
            yield taken
            taken = []
            step = int(done * num_steps / total) + 1
    assert not taken, "the last step takes all that is left"


def _mixture(units: Sequence[Options], bits: Mapping[str, int], other_bytes: int) -> Mixture:
    kept = [w for unit in units for w in unit.widths if w.num_bits == bits[unit.name]]
    return Mixture(
        dict(bits), other_bytes + sum(w.num_bytes for w in kept), sum(w.kl for w in kept)
    )
