"""Tiny random models of many architectures, and what tests do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.environment import probe_hardware
from qlora_kit.model.base import Base, load_base, prepare_for_training
from qlora_kit.model.skeleton import Skeleton, build_skeleton
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec

COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NEW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
OLD: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


NO_GROUPS = without(NEW, "num_key_value_heads")

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, untied": ("llama", {**NEW, "tie_word_embeddings": False}),
    "llama, tied": ("llama", {**NEW, "tie_word_embeddings": True}),
    "llama, odd sizes": (
        "llama",
        {**NEW, "hidden_size": 36, "intermediate_size": 50, "head_dim": 10},
    ),
    "gpt2: Conv1D, tied": ("gpt2", OLD),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 128,
        },
    ),
    "gpt-neox: fused QKV": ("gpt_neox", NO_GROUPS),
    "gpt-j: head with a bias": ("gptj", {**OLD, "rotary_dim": 8}),
    "codegen: fused QKV": ("codegen", {**OLD, "rotary_dim": 8}),
    "bloom: fused QKV, alibi": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "opt": (
        "opt",
        {**without(NO_GROUPS, "intermediate_size"), "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "opt, projected embeddings": (
        "opt",
        {**without(NO_GROUPS, "intermediate_size"), "ffn_dim": 128, "word_embed_proj_dim": 128},
    ),
    "phi": ("phi", NO_GROUPS),
    "phi3: fused QKV and gate": ("phi3", NEW),
    "qwen2: biases": ("qwen2", NEW),
    "qwen3: norms of queries": ("qwen3", {**NEW, "head_dim": 16}),
    "gemma: norm plus one": ("gemma", {**NEW, "head_dim": 16}),
    "gemma2: soft caps": ("gemma2", {**NEW, "head_dim": 16, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**NEW, "head_dim": 16, "sliding_window": 8}),
    "mistral": ("mistral", NEW),
    "stablelm": ("stablelm", NEW),
    "starcoder2": ("starcoder2", NEW),
    "olmo2": ("olmo2", NEW),
    "cohere": ("cohere", NEW),
    "granite": ("granite", NEW),
    "glm4": ("glm4", {**NEW, "head_dim": 16}),
    "nemotron: norm plus one": ("nemotron", NEW),
    "smollm3": ("smollm3", NEW),
    "lfm2: convolutions": ("lfm2", NEW),
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**NEW, "num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", {**NEW, **EXPERTS, "num_experts": 4, "head_dim": 16}),
    "qwen3-moe, one dense layer": (
        "qwen3_moe",
        {**NEW, **EXPERTS, "num_experts": 4, "head_dim": 16, "mlp_only_layers": [0]},
    ),
    "qwen2-moe: a shared expert with a gate": (
        "qwen2_moe",
        {**NEW, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    "deepseek-v3: a dense layer and shared experts": (
        "deepseek_v3",
        {
            **NEW,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    "gpt-oss: experts with biases": ("gpt_oss", {**NEW, "head_dim": 16, "num_local_experts": 4}),
    "llama4: a router that is a linear layer": (
        "llama4_text",
        {**NEW, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 128},
    ),
    "phimoe": ("phimoe", {**NEW, "num_local_experts": 4}),
    "granitemoe": ("granitemoe", {**NEW, "num_local_experts": 4}),
}


def build(folder: Path, model_type: str, values: dict[str, Any]) -> Path:
    """Save a random model whose biases and norms are not the trivial ones of a fresh one."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**COMMON, **values})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def skeleton_of(name: str, **changed: Any) -> Skeleton:
    """An architecture of this zoo without weights and without a folder."""
    model_type, values = {**DENSE, **MIXTURES}[name]
    return build_skeleton(AutoConfig.for_model(model_type, **{**COMMON, **values, **changed}))


def load(
    folder: Path,
    quantization: QuantizationSpec | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    lora: LoraSpec | None = None,
    adapter: Path | None = None,
    **spec: Any,
) -> Base:
    """A base as a run loads and prepares it."""
    base = load_base(
        ModelSpec(name_or_path=str(folder), **spec),
        quantization or QuantizationSpec(),
        dtype,
        "a test",
        probe_hardware(),
        lora=lora,
        adapter=adapter,
    )
    prepare_for_training(base.model, upcast_norms=False)
    return base


def some_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def shake(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Give every trainable parameter values that matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)


def train_a_step(
    model: torch.nn.Module, rate: float = 0.5, ids: torch.Tensor | None = None
) -> float:
    """One step of plain gradient descent; returns the loss before it."""
    model.train()
    ids = some_ids() if ids is None else ids
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None
    return float(loss.detach())


def logits(model: torch.nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    model.eval()
    ids = some_ids() if ids is None else ids
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found
