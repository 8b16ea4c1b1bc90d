"""Several models side by side, each measured in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_kit.data.read import require_readable
from qlora_kit.environment import settle_upstream
from qlora_kit.errors import HardwareError, QloraKitError
from qlora_kit.evaluate.one import Measurement, Task, measure_one


@dataclass(frozen=True)
class Failure:
    """A model that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """In the order that was asked for; the others are compared with the first."""

    measured: tuple[Measurement, ...]
    failures: tuple[Failure, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "reference": self.measured[0].name,
            "models": [one.as_dict() for one in self.measured],
            "failures": [{"name": one.name, "reason": one.reason} for one in self.failures],
        }


def compare_models(names: Sequence[str], task: Task) -> Comparison:
    """Measure the models one after the other; they need not fit into memory together.

    `task.scratch` is the folder in which a folder for the record is made, and removed again. A
    model that cannot be measured is told at the end, the first one at once.

    Raises:
        QloraKitError: the first one cannot be measured.
    """
    require_readable(task.data.eval)
    measured: list[Measurement] = []
    failures: list[Failure] = []
    with TemporaryDirectory(prefix="qlora-kit-compare-", dir=task.scratch) as scratch:
        task = replace(task, scratch=Path(scratch))
        for number, name in enumerate(names):
            try:
                measured.append(measure_apart(name, task, is_reference=number == 0))
            except QloraKitError as error:
                if number == 0:
                    raise
                failures.append(Failure(name, str(error)))
    return Comparison(tuple(measured), tuple(failures))


def measure_apart(name: str, task: Task, is_reference: bool) -> Measurement:
    """`measure_one` in a fresh process: peaks of one that had another model are worth nothing.

    Raises:
        HardwareError: the process was killed, as the system does where memory runs out.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=settle_upstream) as pool:
        try:
            return pool.submit(measure_one, name, task, is_reference).result()
        except BrokenProcessPool:
            raise HardwareError(
                f"the process that measured {name} was killed, most likely as memory ran out; "
                "compare it on a larger machine, or on fewer rows (--max-tokens)."
            ) from None
