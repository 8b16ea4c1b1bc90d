"""The exact way: one unit at a time is quantized, and the whole model is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.evaluate.divergence import Divergence
from qlora_kit.quantize.rounding import Rounding
from qlora_kit.quantize.sensitivity.reference import Reference
from qlora_kit.quantize.sensitivity.units import Unit
from qlora_kit.report.reporter import Progress


@dataclass(frozen=True)
class Cost:
    """What a unit costs when it alone is quantized; KL in nats per token from the reference."""

    unit: Unit
    divergence: Divergence

    @property
    def kl(self) -> float:
        return self.divergence.kl_mean


def measure_units(
    reference: Reference, units: Sequence[Unit], rounding: Rounding, progress: Progress
) -> tuple[Cost, ...]:
    """In the order of `units`. `progress` counts units."""
    costs = []
    for unit in units:
        divergence = reference.measure_rounded(dict.fromkeys(unit.modules, rounding))
        costs.append(Cost(unit, divergence))
        progress.update(1, kl=f"{unit.name}: KL {divergence.kl_mean:.2g}")
    return tuple(costs)
