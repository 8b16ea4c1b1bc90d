"""Reading tensor by tensor gives what transformers gives, of any architecture, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_kit.environment import probe_hardware
from qlora_kit.model import load as load_module
from qlora_kit.model.base import bitsandbytes_config
from qlora_kit.model.load import load_model
from qlora_kit.model.quantized_cache import KEPT, READ, load_for_all
from qlora_kit.model.shared import state_checksum
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.source import ModelSource
from qlora_kit.recipe import ModelSpec, QuantizationSpec
from qlora_kit.report.reporter import SILENT, Progress, Reporter

from .zoo import DENSE, build


def load(folder: Path, quantized: Path | None = None, told: Reporter = SILENT) -> PreTrainedModel:
    skeleton = build_skeleton(load_config(folder))
    return load_model(
        ModelSource(str(folder), folder, "folder"),
        ModelSpec(name_or_path=str(folder)),
        bitsandbytes_config(QuantizationSpec(), skeleton, torch.float32),
        skeleton,
        torch.float32,
        probe_hardware(),
        quantized,
        told,
    )


@pytest.mark.parametrize("kind", list(DENSE))
def test_is_what_transformers_loads_and_what_the_cache_gives_back(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path / "m", *DENSE[kind])
    entry = tmp_path / "cache" / "entry"
    model, origin = load_for_all(entry, lambda kept: load(folder, kept), pytest.fail)
    assert origin == KEPT
    again, origin = load_for_all(entry, lambda kept: load(folder, kept), pytest.fail)
    assert origin == READ

    def mapped(folder: Path, spec: ModelSpec, _: Any, options: dict[str, Any], __: Any) -> Any:
        return load_module._mapped(folder, spec, options)

    monkeypatch.setattr(load_module, "_tensor_by_tensor", mapped)
    wanted = load(folder)
    assert state_checksum(model) == state_checksum(wanted) == state_checksum(again)
    assert model.config.to_dict() == wanted.config.to_dict()
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert again.generation_config.to_dict() == wanted.generation_config.to_dict()
    buffers = dict(wanted.named_buffers())
    for name, buffer in [*model.named_buffers(), *again.named_buffers()]:
        assert torch.equal(buffer, buffers[name]), name


def test_progress_of_a_large_model_is_shown(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(Progress):
        done = 0

        def update(self, advance: int = 1, **_: str) -> None:
            self.done += advance

    class Listener(Reporter):
        def __init__(self) -> None:
            self.bars: dict[tuple[str, int], Bar] = {}

        def progress(self, name: str, total: int) -> Any:
            from contextlib import nullcontext

            return nullcontext(self.bars.setdefault((name, total), Bar()))

    told = Listener()
    load(tiny_llama, told=told)
    assert not told.bars, "it takes no time that anybody would wait for"
    monkeypatch.setattr(load_module, "_SHOWN_FROM_PARAMETERS", 1)
    load(tiny_llama, told=told)
    ((name, total), bar) = told.bars.popitem()
    assert name == "quantizing"
    assert bar.done == total


BENCH = Path(__file__).parents[3] / "scripts" / "bench_loading.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read")
def test_no_more_is_in_memory_than_what_was_made_and_one_tensor(tmp_path: Path) -> None:
    """Of a model whose largest tensor is quantized: four fifths of it are."""
    made = tmp_path / "figures.json"
    shape = ("--hidden", "1024", "--layers", "8", "--vocabulary", "512", "--shards", "3")
    command = (sys.executable, BENCH, *shape, "--rounds", "1", "--sides", "kit", "--json", made)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(made.read_text())
    (run,) = found["runs"]["kit"]
    between = 48 * 2**20  # buffers, and what the sampling of memory itself takes
    assert run["peak_bytes"] < run["model_bytes"] + found["largest_tensor_bytes"] + between
    assert run["peak_bytes"] < found["file_bytes"]
