"""Architectures that the kit has never met: load in 4 bits, train, save, load again; or a refusal
before the weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import transformers
from conftest import build_tokenizer
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.model import base as base_module
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.quantized import is_quantized
from qlora_kit.model.saved import load_adapter, save_adapter
from qlora_kit.recipe import LoraSpec, QuantizationSpec

from .zoo import (
    COMMON,
    DENSE,
    MIXTURES,
    NEW,
    NO_GROUPS,
    build,
    load,
    logits,
    shake,
    some_ids,
    train_a_step,
)

LORA = LoraSpec(r=4, alpha=8)
DENSE_16 = QuantizationSpec(load_in_4bit=False)


def linear_names(model: torch.nn.Module) -> set[str]:
    """Without the head; written here once more, to be held against what the kit says."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def there_and_back(
    folder: Path, quantization: QuantizationSpec, names: set[str] | None = None
) -> None:
    """Load, attach, train a step, save, load onto a fresh base: equal logits."""
    base = load(folder, quantization, lora=LORA)
    names = linear_names(base.skeleton.model) if names is None else names
    before = logits(base.model)
    model = attach_adapter(base, LORA, seed=0).model
    carriers = {
        name.removeprefix("base_model.model.").rpartition(".lora_A.")[0]
        for name, _ in model.named_parameters()
        if ".lora_A." in name
    }
    assert carriers == names
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    losses = [train_a_step(model) for _ in range(3)]
    assert losses[-1] < losses[0]
    still = [
        name for name, value in model.named_parameters() if ".lora_B." in name and not value.any()
    ]
    assert still == [], "adapters that no gradient reached"
    shake(model)
    tuned = logits(model)
    assert not torch.allclose(tuned, before, atol=1e-2)
    save_adapter(model, base, quantization, "0" * 64, folder / "adapter")

    again = load(folder, quantization, adapter=folder / "adapter")
    reloaded, differing = load_adapter(again, quantization, folder / "adapter")
    assert differing == []
    torch.testing.assert_close(logits(reloaded), tuned, rtol=0, atol=0)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_in_four_bits(name: str, tmp_path: Path) -> None:
    folder = build(tmp_path, *DENSE[name])
    there_and_back(folder, QuantizationSpec())


@pytest.mark.parametrize("name", DENSE)
def test_all_linear_layers_but_the_head_are_quantized(name: str, tmp_path: Path) -> None:
    base = load(build(tmp_path, *DENSE[name]))
    names = linear_names(base.skeleton.model)
    packed = {name for name, module in base.model.named_modules() if is_quantized(module)}
    assert packed == names
    counted = {key: value.numel() for key, value in base.skeleton.model.named_parameters()}
    assert base.quantized.num_quantized == sum(counted[f"{name}.weight"] for name in names)
    assert base.quantized.num_parameters == sum(counted.values())


@pytest.mark.parametrize(
    "name", ["gpt2: Conv1D, tied", "qwen2: biases", "phi3: fused QKV and gate"]
)
def test_dense_models_in_eight_bits(name: str, tmp_path: Path) -> None:
    there_and_back(build(tmp_path, *DENSE[name]), QuantizationSpec(load_in_8bit=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_refused_in_four_and_eight_bits_before_the_weights_are_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path, *MIXTURES[name])
    nothing_is_read(monkeypatch)
    for quantization in (QuantizationSpec(), QuantizationSpec(load_in_8bit=True)):
        with pytest.raises(ModelError, match=r"experts in fused tensors.*load_in_4bit: false"):
            load(folder, quantization)


def test_layers_with_an_odd_number_of_inputs(tmp_path: Path) -> None:
    """bitsandbytes takes its generic code for these, which it would compile at length."""
    folder = build(tmp_path, "llama", {**NEW, "intermediate_size": 51})
    with torch._dynamo.config.patch(disable=True):  # a monkeypatch leaves it without a value
        there_and_back(folder, QuantizationSpec())


FUSED_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_train_in_sixteen_bits_without_their_routers(name: str, tmp_path: Path) -> None:
    folder = build(tmp_path, *MIXTURES[name])
    base = load(folder, DENSE_16)
    linear = linear_names(base.skeleton.model)
    routers = {
        one for one in linear if {"router", "gate", "shared_expert_gate"} & set(one.split("."))
    }
    wanted = linear - routers
    # Where PEFT takes a name for the experts of old, whatever carries it is left alone.
    if base.skeleton.model.config.model_type in ("mixtral", "qwen3_moe", "deepseek_v3"):
        wanted = {one for one in wanted if one.rpartition(".")[2] not in FUSED_NAMES}
    assert any("attn" in one or "attention" in one for one in wanted)
    there_and_back(folder, DENSE_16, wanted)


def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a test fails where weights are read."""
    for name in ("scan_weights", "load_model"):
        monkeypatch.setattr(base_module, name, lambda *_: pytest.fail("the weights were read"))


def test_linear_layers_of_a_class_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path, "falcon", without_intermediate())
    there_and_back(folder, DENSE_16)
    nothing_is_read(monkeypatch)
    with pytest.raises(ModelError, match=r"FalconLinear.*query_key_value.*load_in_4bit: false"):
        load(folder)


def without_intermediate() -> dict[str, Any]:
    return {key: value for key, value in NO_GROUPS.items() if key != "intermediate_size"}


def test_foreign_layers_that_are_skipped_are_no_fault(tmp_path: Path) -> None:
    """Half of Falcon's are skipped by name, half are not: the fault names the others."""
    folder = build(tmp_path, "falcon", without_intermediate())
    with pytest.raises(ModelError, match="4 linear layers of falcon") as caught:
        load(folder, QuantizationSpec(skip_modules=("query_key_value", "attention.dense")))
    assert "self_attention" not in str(caught.value)


def test_what_bypasses_its_adapters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    folder = build(tmp_path, "mamba", values)
    read = ("dt_proj", "out_proj", "x_proj")
    spared = LoraSpec(r=4, exclude_modules=read)
    skipping = QuantizationSpec(skip_modules=read)
    model = attach_adapter(load(folder, skipping, lora=spared), spared, 0).model
    shake(model)
    ids = some_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained)
    nothing_is_read(monkeypatch)
    with pytest.raises(ModelError, match=r"skip_modules: \[dt_proj, out_proj, x_proj\]"):
        load(folder)
    with pytest.raises(AdapterError, match=r"exclude_modules: \[dt_proj, out_proj, x_proj\]"):
        load(folder, skipping, lora=LORA)


def test_weights_that_are_rewritten_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path, "rwkv", {"hidden_size": 64, "num_hidden_layers": 2})
    nothing_is_read(monkeypatch)
    with pytest.raises(ModelError, match="rwkv rewrites its weights"):
        load(folder)


ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {**NO_GROUPS},
    "Roberta": {**NO_GROUPS},
    "T5": {"d_model": 64, "num_layers": 1, "num_heads": 4, "d_kv": 16, "d_ff": 64},
    "Bart": {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
    "CLIP": {},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_no_causal_language_model_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tokenizer(tmp_path)
    vocabulary = {} if name == "CLIP" else COMMON
    config = getattr(transformers, f"{name}Config")(**vocabulary, **ENCODERS[name])
    config.save_pretrained(tmp_path)
    nothing_is_read(monkeypatch)
    with pytest.raises(ModelError, match="not a causal language model"):
        load(tmp_path)


def test_a_decoder_made_of_an_encoder_is_taken(tmp_path: Path) -> None:
    folder = build(tmp_path, "bert", {**NO_GROUPS, "is_decoder": True})
    there_and_back(folder, QuantizationSpec())


def test_images_are_left_alone(tmp_path: Path) -> None:
    """A model that sees: adapters go on what text passes through."""
    vision = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    }
    values = {
        "text_config": {**COMMON, **NEW, "head_dim": 16},
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "image_token_index": 383,
        "boi_token_index": 382,
        "eoi_token_index": 381,
    }
    folder = build(tmp_path, "gemma3", values)
    base = load(folder)
    names = {one for one in linear_names(base.skeleton.model) if ".language_model." in one}
    assert len(names) == 14
    there_and_back(folder, QuantizationSpec(), names)


def test_a_new_version_of_transformers_is_named_where_the_type_is_unknown(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama9"}))
    with pytest.raises(ModelError, match=r"config\.json cannot be used: .*llama9"):
        load(tmp_path)
