"""Checkpoint names and parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.names import is_quantization_state, map_names
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.skeleton import Skeleton, build_skeleton, load_config
from qlora_kit.recipe import QuantizationSpec

from .tiny_runs import CONFIGS, save_model


def names_of(folder: Path) -> tuple[Skeleton, list[str]]:
    with Checkpoint(folder) as checkpoint:
        return build_skeleton(load_config(folder)), checkpoint.names()


def test_a_missing_base_prefix_is_added(tmp_path: Path) -> None:
    """GPT-2's own checkpoint says `h.0.…` for `transformer.h.0.…`, and stores causal masks."""
    save_model(tmp_path, CONFIGS["gpt2"]())
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
    tensors["h.0.attn.masked_bias"] = torch.zeros(())
    save_file(tensors, path, metadata={"format": "pt"})
    skeleton, names = names_of(tmp_path)
    found = map_names(skeleton, names, quantized_bits(skeleton, QuantizationSpec()))
    assert found.parameters["h.0.attn.c_attn.weight"] == "transformer.h.0.attn.c_attn.weight"
    assert found.parameters["wte.weight"] == "transformer.wte.weight"
    assert found.unused == ("h.0.attn.masked_bias",)
    assert not found.fused


def test_old_spellings_are_renamed(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["gpt2"]())
    skeleton = build_skeleton(load_config(tmp_path))
    assert map_names(skeleton, ["transformer.ln_f.weight"], ()).parameters
    assert map_names(skeleton, ["nowhere.weight"], ()).unused == ("nowhere.weight",)


def test_fused_tensors_are_passed_on_unless_they_must_change(tmp_path: Path) -> None:
    """A mixture of experts keeps each expert apart on disk and all together in memory."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    save_model(tmp_path, config)
    skeleton, names = names_of(tmp_path)
    found = map_names(skeleton, names, {"model.layers.0.self_attn.q_proj"})
    assert len(found.passed) == 12
    assert not found.fused
    found = map_names(skeleton, names, {"model.layers.0.mlp.experts"})
    assert len(found.fused) == 12


def test_what_a_quantized_weight_is_stored_with_is_no_tensor_of_the_model() -> None:
    for name in (
        "a.weight.absmax",
        "a.weight.nested_quant_map",
        "a.weight.quant_state.bitsandbytes__nf4",
        "a.SCB",
        "a.weight_format",
    ):
        assert is_quantization_state(name)
    for name in ("a.weight", "a.bias", "absmax.weight", "SCB.weight"):
        assert not is_quantization_state(name)


def test_an_unquantized_base_has_no_quantized_bits(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["llama"]())
    skeleton = build_skeleton(load_config(tmp_path))
    assert not quantized_bits(skeleton, QuantizationSpec(load_in_4bit=False))
    assert "lm_head" not in quantized_bits(skeleton, QuantizationSpec())
