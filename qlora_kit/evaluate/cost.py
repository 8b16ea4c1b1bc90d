"""What one model takes: size, memory, time to open it, tokens per second."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.environment import probe_hardware
from qlora_kit.evaluate.speed import Speed, SpeedPlan, measure_speed
from qlora_kit.memory.process import peak_device_bytes, peak_resident_bytes, resident_bytes
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.open import RuntimeName, import_runtime, open_runtime, runtime_of
from qlora_kit.runtime.protocol import Footprint

if TYPE_CHECKING:
    from qlora_kit.recipe import ModelSpec
    from qlora_kit.runtime.protocol import Runtime


@dataclass(frozen=True)
class Cost:
    """Of one model. What was not asked for, or cannot be measured, is None.

    `parameters` are counted by the form they are stored in. Peaks are those of a process that has
    opened this model and nothing else; `idle_bytes` is what it had before. `notes` say what to
    know when the figures are read beside another model's.
    """

    runtime: RuntimeName
    footprint: Footprint
    load_seconds: float
    idle_bytes: int
    peak_bytes: int
    peak_device_bytes: int | None
    speed: Speed | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["footprint"]["num_parameters"] = self.footprint.num_parameters
        return values


def open_measured(
    name: str,
    model: ModelSpec | None,
    force: bool,
    plan: SpeedPlan | None,
    reporter: Reporter = SILENT,
) -> tuple[Runtime, Cost]:
    """Open a model as `open_runtime` does, and time it; without a plan speed is left out.

    To be called in a process that has not opened a model before, and before any row is read: the
    peak is then that of loading and answering.

    Raises:
        QloraKitError: it cannot be opened, or its context has no room for an answer.
    """
    probe_hardware()
    import_runtime(name)
    idle = resident_bytes()
    started = time.perf_counter()
    runtime = open_runtime(name, model, force, reporter)
    load_seconds = time.perf_counter() - started
    at_first = runtime.footprint()
    speed = None
    if plan is not None:
        count = 2 * (plan.warmups + plan.repetitions)
        with reporter.progress(f"{name}: speed", count) as progress:
            speed = measure_speed(runtime, plan, progress)
    cost = Cost(
        runtime=runtime_of(name),
        footprint=at_first,
        load_seconds=load_seconds,
        idle_bytes=idle,
        peak_bytes=peak_resident_bytes(),
        peak_device_bytes=peak_device_bytes(),
        speed=speed,
        notes=_timed_shorter(speed, plan),
    )
    return runtime, cost


def once_used(cost: Cost, runtime: Runtime) -> Cost:
    """With what the weights take now that the model has been used."""
    at_first, in_use = cost.footprint, runtime.footprint()
    return replace(
        cost,
        footprint=replace(at_first, memory_bytes=in_use.memory_bytes),
        notes=(*cost.notes, *_unpacked(at_first, in_use)),
    )


def _timed_shorter(speed: Speed | None, plan: SpeedPlan | None) -> tuple[str, ...]:
    """A rate of reading depends on how much is read at once."""
    if speed is None or plan is None or speed.prompt_tokens == plan.prompt_tokens:
        return ()
    return (
        f"its context is too short for a prompt of {plan.prompt_tokens} tokens and the answer: "
        f"reading was timed with {speed.prompt_tokens}, and compares with others' only loosely",
    )


def _unpacked(at_first: Footprint, in_use: Footprint) -> tuple[str, ...]:
    """Some libraries keep packed weights only until they are used."""
    if in_use.memory_bytes < 1.1 * at_first.memory_bytes:
        return ()
    return (
        f"its weights are unpacked when they are first used: "
        f"{at_first.memory_bytes / 2**20:,.1f} MiB after loading, "
        f"{in_use.memory_bytes / 2**20:,.1f} MiB then",
    )
