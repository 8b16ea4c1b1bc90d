"""Liger's Triton kernels: their tests run in Triton's interpreter, in a process that has it from
the start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_kit.model.fused import liger

TESTS = Path(__file__).parents[3]


def test_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is for Linux")
    pytest.importorskip("liger_kernel", reason="liger-kernel is for Linux")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(TESTS / "interpreted"),
            "-p",
            "no:xdist",
            "--durations=0",
        ],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_who_has_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert liger.why_no_liger(torch.device("cpu")) == "Triton kernels need a GPU"
    monkeypatch.setattr(liger, "fault_of", lambda name: "liger_kernel, not installed here")
    assert liger.why_no_liger(torch.device("cuda")) == (
        "needs liger_kernel, not installed here; pip install 'qlora-kit[liger]'"
    )
    monkeypatch.setattr(liger, "fault_of", lambda name: None)
    assert liger.why_no_liger(torch.device("cuda")) is None
