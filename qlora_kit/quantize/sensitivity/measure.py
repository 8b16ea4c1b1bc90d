"""The straight line of `sensitivity`: from a model and rows to what every unit costs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ModelError
from qlora_kit.quantize.rounding import Rounding, shape_of, turned_weight
from qlora_kit.quantize.sensitivity.cheap import BEST, estimate_costs
from qlora_kit.quantize.sensitivity.exact import Cost, measure_units
from qlora_kit.quantize.sensitivity.ranking import spearman, spread
from qlora_kit.quantize.sensitivity.reference import Reference
from qlora_kit.quantize.sensitivity.statistics import LayerStatistics, collect
from qlora_kit.quantize.sensitivity.units import By, Unit, units_of
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.model.base import Base

Rows = Sequence["TokenSequence"]
_INT8 = Rounding("int8")


@dataclass(frozen=True)
class Plan:
    """What is asked of a measurement."""

    rounding: Rounding
    by: By = "layer"
    is_exact: bool = True
    """Measure every unit; otherwise estimate all of them in one pass."""
    check: int = 0
    """Units that are measured to check the estimates, where those are what is asked for."""
    seed: int = 42
    """Of the tokens that the estimates draw."""


@dataclass(frozen=True)
class Entry:
    """What one unit costs when it alone is quantized; KL in nats per token."""

    unit: Unit
    num_parameters: int
    kl: float
    """Measured, or estimated where it was not."""
    estimate: float
    estimate_8bit: float
    """The estimate for 8 bits."""
    cost: Cost | None
    """None where it was not measured."""

    @property
    def kl_8bit(self) -> float:
        """The KL scaled as the estimates say: at 8 bits it drowns in rounding errors of float32."""
        return self.kl * self.estimate_8bit / self.estimate if self.estimate else 0.0

    def as_dict(self) -> dict[str, Any]:
        measured = None if self.cost is None else asdict(self.cost.divergence)
        return {
            "name": self.unit.name,
            "modules": list(self.unit.modules),
            "num_parameters": self.num_parameters,
            "kl": self.kl,
            "kl_8bit": self.kl_8bit,
            "estimate": self.estimate,
            "measured": measured,
        }


@dataclass(frozen=True)
class Agreement:
    """Two orders of the same units, compared."""

    spearman: float
    num_units: int


@dataclass(frozen=True)
class Sensitivity:
    """What came of a measurement; `entries` in the order of the model."""

    plan: Plan
    entries: tuple[Entry, ...]
    num_tokens: int
    check: Agreement | None
    """Estimates against measurements, on the units that were measured."""
    stability: Agreement | None
    """The ranking on these rows against that on others."""
    statistics: tuple[LayerStatistics, ...]
    seconds: float

    @property
    def ranked(self) -> list[Entry]:
        """The most sensitive first."""
        return sorted(self.entries, key=lambda entry: -entry.kl)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rounding": asdict(self.plan.rounding),
            "by": self.plan.by,
            "mode": "exact" if self.plan.is_exact else "cheap",
            "num_tokens": self.num_tokens,
            "check": None if self.check is None else asdict(self.check),
            "stability": None if self.stability is None else asdict(self.stability),
            "seconds": round(self.seconds, 1),
            "ranking": [entry.as_dict() for entry in self.ranked],
            "statistics": [asdict(one) for one in self.statistics],
        }


def measure_sensitivity(
    base: Base, rows: Rows, plan: Plan, other_rows: Rows | None = None, reporter: Reporter = SILENT
) -> Sensitivity:
    """What every unit of `base`, which is in reference precision, costs when it is quantized.

    With `other_rows`, the ranking is made on those as well and compared.

    Raises:
        ModelError: there is nothing to quantize.
        HardwareError: no room on the disk for what the reference says.
    """
    started = time.monotonic()
    units = units_of(base.skeleton.linear_modules, plan.by)
    if not units:
        raise ModelError(f"{base.source.name} has no linear layer that could be quantized.")
    statistics = base_statistics(base, plan.rounding, reporter)
    entries = _entries(base, units, rows, plan, reporter)
    stability = None
    if other_rows is not None:
        others = _entries(base, units, other_rows, plan, reporter, " on other rows")
        stability = _agreement([one.kl for one in entries], [one.kl for one in others])
    measured = [entry for entry in entries if entry.cost is not None]
    return Sensitivity(
        plan=plan,
        entries=tuple(entries),
        num_tokens=sum(row.num_supervised for row in rows),
        check=_agreement(
            [one.cost.kl for one in measured if one.cost], [one.estimate for one in measured]
        ),
        stability=stability,
        statistics=tuple(statistics),
        seconds=time.monotonic() - started,
    )


def base_statistics(
    base: Base, rounding: Rounding, reporter: Reporter = SILENT
) -> list[LayerStatistics]:
    """Of every layer that can be quantized."""
    names = base.skeleton.linear_modules
    weights = ((name, turned_weight(base.model.get_submodule(name))) for name in names)
    with reporter.progress("statistics of the weights", len(names)) as progress:
        return collect(weights, rounding, progress.update)


def _entries(
    base: Base, units: Sequence[Unit], rows: Rows, plan: Plan, reporter: Reporter, where: str = ""
) -> list[Entry]:
    num_tokens = sum(row.num_supervised for row in rows)
    with reporter.progress(f"estimating{where}", num_tokens) as progress:
        found = estimate_costs(
            base.model,
            rows,
            base.skeleton.linear_modules,
            {"asked": plan.rounding, "8 bits": _INT8},
            base.compute_dtype,
            seed=plan.seed,
            progress=progress,
        )
    estimates = _summed(units, {name: one[BEST] for name, one in found["asked"].items()})
    eights = _summed(units, {name: one[BEST] for name, one in found["8 bits"].items()})
    chosen = range(len(units)) if plan.is_exact else spread(estimates, plan.check)
    costs = _measured(base, [units[i] for i in chosen], rows, plan, reporter, where)
    return [
        Entry(
            unit=unit,
            num_parameters=num_parameters(base, unit.modules),
            kl=costs[unit.name].kl if plan.is_exact else estimate,
            estimate=estimate,
            estimate_8bit=eight,
            cost=costs.get(unit.name),
        )
        for unit, estimate, eight in zip(units, estimates, eights, strict=True)
    ]


def _measured(
    base: Base, units: Sequence[Unit], rows: Rows, plan: Plan, reporter: Reporter, where: str
) -> dict[str, Cost]:
    if not units:
        return {}
    with reference_of(base, rows, reporter) as reference:
        if not reference.reuses_blocks:
            reporter.say("every forward pass is of the whole model: blocks cannot be passed over")
        with reporter.progress(f"measuring{where}", len(units)) as progress:
            costs = measure_units(reference, units, plan.rounding, progress)
    return {cost.unit.name: cost for cost in costs}


@contextmanager
def reference_of(base: Base, rows: Rows, reporter: Reporter = SILENT) -> Iterator[Reference]:
    """A `Reference` of a base; its record is deleted when the context ends."""
    total = sum(row.num_supervised for row in rows)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-") as folder:
        with reporter.progress("recording the reference", total) as progress:
            reference = Reference(
                base.model,
                rows,
                Path(folder),
                base.tokenizer.pad_token_id,
                base.compute_dtype,
                progress,
            )
        yield reference


def num_parameters(base: Base, modules: Sequence[str]) -> int:
    return sum(math.prod(shape_of(base.skeleton.model.get_submodule(name))) for name in modules)


def _summed(units: Sequence[Unit], by_module: Mapping[str, float]) -> list[float]:
    return [sum(by_module[name] for name in unit.modules) for unit in units]


def _agreement(one: Sequence[float], other: Sequence[float]) -> Agreement | None:
    """None where there are fewer than three units, of which no order says anything."""
    return Agreement(spearman(one, other), len(one)) if len(one) > 2 else None
