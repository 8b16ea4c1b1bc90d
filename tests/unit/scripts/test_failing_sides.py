"""bench_train: a side that fails is told with its last lines, and the others go on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_train
import pytest
from train_bench.registry import Turn
from train_bench.watch import SCRIPTS, Failure, run


def fake(path: Path, does: str) -> Path:
    """An interpreter that has every package, and as a side does this (`$5`: the bench's folder)."""
    path.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo 1.0; exit 0; fi\n{does}\n')
    path.chmod(0o755)
    return path


def telling(*losses: float) -> str:
    """What a side does that has figures, as a shell writes it."""
    ends = [[4e9 + n, n] for n in range(len(losses))]
    told = {"losses": losses, "ends": ends, "recomputes": "none", "versions": {}}
    told["device"] = {}
    return f"cat > $5/told.json <<'END'\n{json.dumps(told)}\nEND"


FAILS = {
    "echo No module named nonsense >&2; exit 3": "exit code 3.\nNo module named nonsense",
    "echo 30 GiB asked for; kill -9 $$": "killed by SIGKILL.\n30 GiB asked for",
    "echo nothing to do": "it ended without its figures.\nnothing to do",
    telling(2.0): "it told the end of 1 of 2 updates.",
}


@pytest.mark.parametrize("does", FAILS)
def test_a_side_that_fails_is_told_with_its_last_lines(tmp_path: Path, does: str) -> None:
    python = fake(tmp_path / "python", does)
    arguments = argparse.Namespace(
        axolotl=python, threads=1, updates=2, device="cpu", precision="fp32"
    )
    ended = run(Turn("axolotl", "auto", "axolotl"), tmp_path, arguments)
    assert isinstance(ended, Failure)
    assert str(ended) == f"axolotl failed: {FAILS[does]}"


def test_others_go_on_where_sides_fail(
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One fails in its second round, one has no package; the third is told about."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n")
    once = f"if [ -e $5/second ]; then echo gone; exit 1; fi; touch $5/second; {telling(2, 1)}"
    sides = {
        "llama-factory": fake(tmp_path / "lf", once),
        "axolotl": fake(tmp_path / "ax", telling(2, 1)),
        "torchtune": Path(sys.executable),
    }
    options = [one for side, python in sides.items() for one in (f"--{side}", str(python))]
    given = ["--model", tiny_llama, "--rows", tmp_path / "rows.jsonl", "--json", tmp_path / "json"]
    options += [*map(str, given), "--updates", "2", "--rounds", "3", "--batch", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--sides", *sides, *options])
    assert bench_train.main() == 1
    said = capsys.readouterr()
    assert "torchtune; install it there." in said.err
    assert "llama-factory failed: exit code 1.\ngone" in said.err
    assert "llama-factory: exit code 1. It is not compared." in said.err
    assert "axolotl 0\n" in said.out
    found = json.loads((tmp_path / "json").read_text())
    assert list(found["figures"]) == ["axolotl"]
    assert len(found["figures"]["axolotl"]["runs"]) == 3
    assert [one["label"] for one in found["failures"]] == ["torchtune", "llama-factory"]


def test_a_side_of_another_environment_needs_nothing_of_the_kit() -> None:
    """What LLaMA-Factory's and Axolotl's own Python imports before it comes to the tool."""
    code = (
        "import sys; sys.modules.update(qlora_kit=None, torch=None, transformers=None)\n"
        "import train_bench.child"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
