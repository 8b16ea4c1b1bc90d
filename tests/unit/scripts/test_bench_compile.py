"""bench_compile: each way is measured compiled and as it is, and layers are themselves again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import bench_compile
import pytest
import torch
from plainly import Fault
from torch import nn

OPTIONS = ("--length", "12", "--rank", "2", "--rounds", "2", "--backend", "eager")


def test_each_way_has_its_line(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_compile.py", "--model", str(tiny_llama), *OPTIONS])
    bench_compile.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines[2:]] == ["peft", "LoRA in one", "and MLP, norm"]
    assert all("CPU s" in line for line in lines[2:])


def test_layers_that_compute_otherwise_compiled_are_no_comparison() -> None:
    layers = nn.ModuleList([nn.Linear(3, 3)])

    def wrong(graph: Any, _: Any) -> Any:
        return lambda *inputs: [2 * one for one in graph(*inputs)]

    def step() -> torch.Tensor:
        return layers[0](torch.ones(1, 3)).square().sum()

    own = layers[0]
    arguments = argparse.Namespace(backend=wrong, rounds=1)
    with pytest.raises(Fault, match="peft: the loss is"):
        bench_compile.measure("peft", step, layers, arguments)
    assert layers[0] is own


def test_an_unknown_backend_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_compile.py", "--backend", "nonsense"])
    with pytest.raises(SystemExit) as ended:
        bench_compile.main()
    assert ended.value.code == 1
    assert "--backend nonsense is none of torch.compile's" in capsys.readouterr().err
