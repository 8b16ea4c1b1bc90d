"""A budget of memory, held against the memory of the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.plan.small_run import small_recipe

_MIB = 2**20


def trained(folder: Path, *overrides: str) -> tuple[int, list[float]]:
    """(peak of a process of its own while training, in bytes; the losses)"""
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    changes = [f"run_dir={run}", *overrides]
    command = [sys.executable, "-m", "qlora_kit", "train", str(folder / "recipe.yaml"), *changes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    losses = [one["loss"] for one in lines if "loss" in one]
    return summary["memory"]["host_peak_bytes"]["training"], losses


def test_a_process_stays_within_its_budget(tmp_path: Path) -> None:
    small_recipe(tmp_path, "fp32")
    batch = ("train.per_device_train_batch_size=8", "train.max_steps=3")
    layers = "train.gradient_checkpointing=auto"
    free, wanted = trained(tmp_path, *batch, layers)
    budget = free - 40 * _MIB
    peak, losses = trained(tmp_path, *batch, layers, f"train.memory_budget={budget}B")
    assert peak <= budget
    assert losses == pytest.approx(wanted, rel=1e-5)
