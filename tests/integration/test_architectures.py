"""Models that the kit has never met: load, train a few steps, merge, reload; or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_tokenizer

from .conftest import Call, write_recipe

COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_LIKE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GEMMA_LIKE: dict[str, Any] = {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 64}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2 (Conv1D)": (
        "GPT2",
        {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    ),
    "gpt-neox (fused QKV, untied)": (
        "GPTNeoX",
        {**LLAMA_LIKE, "tie_word_embeddings": False},
    ),
    "bloom (fused QKV, alibi)": ("Bloom", {**COMMON, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "opt (learned positions)": (
        "OPT",
        {
            **COMMON,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "phi3 (fused gate and up)": ("Phi3", LLAMA_LIKE),
    "qwen2 (biases, tied)": ("Qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen3 (query norms, untied)": ("Qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "mistral (sliding window)": ("Mistral", {**LLAMA_LIKE, "sliding_window": 64}),
    "gemma2 (soft caps, tied)": ("Gemma2", {**GEMMA_LIKE, "query_pre_attn_scalar": 16}),
    "gemma3 (local and global)": ("Gemma3Text", {**GEMMA_LIKE, "query_pre_attn_scalar": 16}),
    "llama, odd sizes": (
        "Llama",
        {**LLAMA_LIKE, "hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 4},
    ),
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**LLAMA_LIKE, **EXPERTS, "num_experts": 4, "head_dim": 16}),
}


def build(folder: Path, name: str, values: dict[str, Any]) -> Path:
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def certified(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "run/merged/certificate.json").read_text())
    return values


@pytest.mark.parametrize("name", DENSE)
def test_whole_line(name: str, tmp_path: Path, call: Call) -> None:
    model = build(tmp_path / "model", *DENSE[name])
    recipe = write_recipe(tmp_path, model)
    said = call("train", str(recipe), "train.max_steps=8", "evaluate.generate=null")
    assert said.code == 0, said.err
    certificate = certified(tmp_path)
    assert certificate["passed"]
    assert certificate["divergence"]["kl_mean"] < 1e-7
    assert certificate["num_modules"] >= 8
    training = json.loads((tmp_path / "run/summary.json").read_text())["training"]
    assert training["last_loss"] < training["first_loss"]


def test_linear_layers_that_bitsandbytes_passes_over_are_refused(
    tmp_path: Path, call: Call
) -> None:
    """Falcon's are a class of their own; in 16 bits it trains."""
    model = build(tmp_path / "model", "Falcon", {**LLAMA_LIKE, "new_decoder_architecture": False})
    recipe = write_recipe(tmp_path, model)
    refused = call("train", str(recipe))
    assert refused.code == 1
    assert "query_key_value" in refused.err
    assert "load_in_4bit: false" in refused.err
    assert not (tmp_path / "run").exists()
    said = call(
        "train",
        str(recipe),
        "quantization.load_in_4bit=false",
        "export.merge_options.base=original",
        "train.max_steps=2",
        "evaluate.generate=null",
    )
    assert said.code == 0, said.err


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_refused_in_4_bits_and_trained_in_16(
    name: str, tmp_path: Path, call: Call
) -> None:
    model = build(tmp_path / "model", *MIXTURES[name])
    recipe = write_recipe(tmp_path, model)
    refused = call("train", str(recipe))
    assert refused.code == 1
    assert "experts" in refused.err
    assert "load_in_4bit: false" in refused.err
    assert not (tmp_path / "run").exists()
    said = call(
        "train",
        str(recipe),
        "quantization.load_in_4bit=false",
        "export.merge_options.base=original",
        "train.max_steps=3",
        "evaluate.generate=null",
    )
    assert said.code == 0, said.err
    assert certified(tmp_path)["divergence"]["kl_mean"] < 1e-7
    targets = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert not {"gate", "router"} & set(targets["target_modules"])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("Bert", {"vocab_size": 384, "hidden_size": 48, "num_hidden_layers": 1}),
        ("T5", {"vocab_size": 384, "d_model": 64, "num_layers": 1, "num_heads": 4}),
    ],
)
def test_what_is_no_causal_language_model_is_refused(
    name: str, values: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    folder = tmp_path / "model"
    build_tokenizer(folder)
    getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**values)
    ).save_pretrained(folder)
    said = call("train", str(write_recipe(tmp_path, folder)))
    assert said.code == 1
    assert "causal" in said.err
    assert not (tmp_path / "run").exists()
