"""FSDP2's `fully_shard` on two gloo processes: shared out, a model trains as if it were whole.

The Trainer's own way to it needs GPUs (on a CPU it becomes DDP, which is refused): tests/gpu.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from together import environment_of_launch

SCRIPT = Path(__file__).parents[1] / "shard.py"


@pytest.fixture(scope="module")
def told(tiny_llama_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint-3"
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    done = subprocess.run(
        [
            torchrun,
            "--nproc-per-node",
            "2",
            str(SCRIPT),
            str(tiny_llama_untied),
            "bfloat16",
            str(folder),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment_of_launch(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_it_gives_the_loss_of_the_whole_model(told: list[dict[str, Any]]) -> None:
    for sharded, alone in told[0]["losses"]:
        assert sharded == pytest.approx(alone, rel=1e-5)
    assert told[0]["losses"][0] != pytest.approx(told[0]["losses"][-1], rel=1e-3)


def test_each_process_holds_half_of_the_packed_weights(told: list[dict[str, Any]]) -> None:
    for one in told:
        here, alone = one["bytes"]
        assert here == pytest.approx(alone / 2, rel=0.02)


def test_the_adapter_and_the_optimizer_are_gathered_and_put_back(
    told: list[dict[str, Any]],
) -> None:
    """Two steps more: the second loss depends on the optimizer's state in the first."""
    for one in told:
        assert one["is_same"]
        gone_on, put_back = one["next_losses"]
        assert put_back == gone_on


def test_what_was_saved_is_the_model_on_one_process(told: list[dict[str, Any]]) -> None:
    loaded, alone = next(one["reloaded"] for one in told if one["reloaded"])
    assert loaded == pytest.approx(alone, rel=1e-5)
