"""What this machine really does a second, and takes beside tensors: measured once, and kept.

Rates of products, of memory and of operations are measured apart; a short training run of a small
random model then says by how much all of them together are off.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit import kept
from qlora_kit.errors import HardwareError
from qlora_kit.lean_imports import is_lean
from qlora_kit.memory.allocator import is_tidy
from qlora_kit.plan.gpus import plain_name
from qlora_kit.plan.small_run import NUM_TOKENS, small_recipe
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.plan.effort import Effort
    from qlora_kit.plan.plan import Plan
    from qlora_kit.recipe import Recipe

_KIND = "calibration"  # in the cache
_METHOD = 8  # another one whenever something else is counted or measured
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROUNDS = 7
_WIDTH = 1024
_VECTOR = 4 * 2**20
_SMALL_OPERATIONS = 200


@dataclass(frozen=True)
class Calibration:
    """Of one machine, in one precision."""

    framework_bytes: int
    """Of a process that trains, tensors and the holes that they leave apart."""
    products_per_second: float
    bytes_per_second: float
    seconds_per_operation: float
    factor: float = 1.0
    """Of a training step against what the rates say."""

    def seconds(self, effort: Effort) -> float:
        by_rates = (
            effort.products / self.products_per_second
            + effort.moved_bytes / self.bytes_per_second
            + effort.num_operations * self.seconds_per_operation
        )
        return self.factor * by_rates


def recalled(hardware: Hardware, precision: str) -> Calibration | None:
    """As measured before on this machine, with these libraries and as many threads."""
    values = kept.recall(_KIND, _key(hardware, precision))
    return None if values is None else Calibration(**values)


def calibrate(
    hardware: Hardware, precision: str, plan_of: Callable[[Recipe], tuple[Plan, Effort]]
) -> Calibration:
    """Measure it, which takes about half a minute, and keep it.

    Args:
        plan_of: plans for this machine; gives the plan and what a step of it has to do.

    Raises:
        HardwareError: the short training run failed.
    """
    device = hardware.device
    rates = Calibration(
        0,
        _products_per_second(device, _DTYPES[precision]),
        _bytes_per_second(device),
        _seconds_per_operation(device),
    )
    with tempfile.TemporaryDirectory(prefix="qlora-kit-calibration-") as scratch:
        recipe = small_recipe(Path(scratch), precision)
        plan, effort = plan_of(recipe)
        peak, seconds = _trained(Path(scratch), device)
    known = plan.moment("training").bytes_beside_framework
    framework = _taken_by_context() if device == "cuda" else peak - known
    found = replace(rates, framework_bytes=int(framework), factor=seconds / rates.seconds(effort))
    kept.keep(_KIND, _key(hardware, precision), asdict(found))
    return found


def _key(hardware: Hardware, precision: str) -> str:
    facts = {
        "method": _METHOD,
        "machine": plain_name(hardware.device_name),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": package_versions(),
        "tidy_heap": is_tidy(),
        "lean_imports": is_lean(),
    }
    return kept.key_of(facts)


def _trained(folder: Path, device: str) -> tuple[int, float]:
    """(peak of the process while training, in bytes; seconds of a step once it is warm)"""
    command = [sys.executable, "-m", "qlora_kit", "train", str(folder / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise HardwareError(
            f"the training run that calibrates failed ({' '.join(last)}); "
            "qlora-kit doctor looks for what is wrong with this machine."
        )
    run = folder / "run"
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "log.jsonl").open(encoding="utf-8")]
    steps = [one for one in lines if "loss" in one]
    warm, last = steps[len(steps) // 2 - 1], steps[-1]
    seconds = (last["seconds"] - warm["seconds"]) / (last["step"] - warm["step"])
    peaks = "device_peak_bytes" if device == "cuda" else "host_peak_bytes"
    return int(summary["memory"][peaks]["training"]), seconds


def _taken_by_context() -> int:
    """Of this GPU, beside what torch has reserved."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _products_per_second(device: str, dtype: torch.dtype) -> float:
    """Of a gradient with a weight, as most products of training are."""
    gradient = torch.ones((NUM_TOKENS, _WIDTH), dtype=dtype, device=device)
    weight = torch.ones((_WIDTH, _WIDTH), dtype=dtype, device=device)
    return 2 * NUM_TOKENS * _WIDTH**2 / _seconds(lambda: gradient @ weight, device)


def _bytes_per_second(device: str) -> float:
    """Of a sum of two long vectors, which reads both and writes a third."""
    one, other = torch.ones(_VECTOR, device=device), torch.ones(_VECTOR, device=device)
    return 3 * one.nbytes / _seconds(lambda: one + other, device)


def _seconds_per_operation(device: str) -> float:
    one = torch.ones(8, device=device)

    def several() -> None:
        for _ in range(_SMALL_OPERATIONS):
            one + one

    return _seconds(several, device) / _SMALL_OPERATIONS


def _seconds(run: Callable[[], object], device: str) -> float:
    """The best of several: other work on the machine can only lengthen it."""
    best = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
