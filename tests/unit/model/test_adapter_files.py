"""What a checkpoint keeps of an adapter in training is what PEFT would have written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tiny
from safetensors.torch import load_file

from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import prepare_for_training
from qlora_kit.model.manifest import MANIFEST_FILE
from qlora_kit.model.saved import WEIGHTS_FILE, adapter_files, write_adapter
from qlora_kit.recipe import LoraSpec, QuantizationSpec

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"new_tokens": ["<tool>", "</tool>"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_and_tensors(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    quantization = QuantizationSpec()
    base = load_tiny(tiny_llama, quantization)
    prepare_for_training(base.model, upcast_norms=False)
    model = attach_adapter(base, LoraSpec(r=4, alpha=8, **KINDS[kind]), 1).model
    described = (model, base, quantization, "0" * 64)
    files = adapter_files(*described)
    with torch.no_grad():  # what is written later has later weights
        for one in model.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one))
    write_adapter(*described, tmp_path)

    theirs = load_file(tmp_path / WEIGHTS_FILE)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert files.names.keys() == theirs.keys()
    assert all(torch.equal(tensors[held], theirs[name]) for name, held in files.names.items())
    trainable = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trainable <= set(files.names.values())

    digest = hashlib.sha256((tmp_path / WEIGHTS_FILE).read_bytes()).hexdigest()
    written = {
        **files.unchanging,
        WEIGHTS_FILE: (tmp_path / WEIGHTS_FILE).read_bytes(),
        MANIFEST_FILE: files.manifest_with(digest),
    }
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, content in files.unchanging.items():
        assert files.digests[name] == hashlib.sha256(content).hexdigest()
