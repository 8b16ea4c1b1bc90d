"""What does not come back is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_kit.environment import Hardware, probe_hardware
from qlora_kit.export.merge import merge_adapter
from qlora_kit.export.reload import (
    load_plain,
    measuring_dtype,
    reload_faults,
    tokenizer_faults,
)

from .tiny_runs import CONFIGS, Tuned, save_model, tiny_tokenizer, tune


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Tuned, Path]:
    save_model(tmp_path / "base", CONFIGS["llama-tied"]())
    tuned = tune(tmp_path / "base", tmp_path / "adapter")
    merge_adapter(tuned.trained, "dequantized", tmp_path / "merged")
    return tuned, tmp_path / "merged"


def faults(tuned: Tuned, folder: Path, tied: bool = True) -> str:
    model, found = load_plain(folder, torch.float32, probe_hardware())
    return "; ".join([*found, *reload_faults(model, folder, tuned.trained, tied)])


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_sound_folder_has_no_faults(merged: tuple[Tuned, Path]) -> None:
    assert faults(*merged) == ""


def test_a_lost_weight(merged: tuple[Tuned, Path]) -> None:
    tuned, folder = merged
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "1 missing keys: model.norm.weight" in faults(tuned, folder)


def test_a_lost_tie(merged: tuple[Tuned, Path]) -> None:
    tuned, folder = merged
    assert "come back tied" in faults(tuned, folder, tied=False)


def test_a_lost_template_and_a_lost_stop(merged: tuple[Tuned, Path]) -> None:
    tuned, folder = merged
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "generation_config.json", eos_token_id=7)
    found = faults(tuned, folder)
    assert "the chat template is another one" in found
    assert "generation does not stop at <eos>" in found


def test_another_tokenizer() -> None:
    one, other = tiny_tokenizer(), tiny_tokenizer()
    assert tokenizer_faults(one, other) == []
    one.add_tokens(["def"])
    one.pad_token = "<unk>"
    found = " ".join(tokenizer_faults(one, other))
    assert "reads '\\tdef f(x)" in found
    assert "knows 129 tokens instead of 128" in found
    assert "pad_token_id is 0 instead of 2" in found


def test_16_bits_are_computed_in_where_they_are_native() -> None:
    machine = probe_hardware()
    values = {**machine.__dict__, "native_bf16": True, "native_fp16": False}
    hardware = Hardware(**values)
    assert measuring_dtype(torch.bfloat16, hardware) == torch.bfloat16
    assert measuring_dtype(torch.float16, hardware) == torch.float32
    assert measuring_dtype(torch.float32, hardware) == torch.float32
