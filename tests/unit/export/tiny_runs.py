"""Tiny random models on disk, and adapters that say something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from qlora_kit.environment import probe_hardware
from qlora_kit.export.trained import TrainedAdapter, trained_adapter
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base, load_base, prepare_for_training
from qlora_kit.model.quantized import never_repacked
from qlora_kit.model.saved import save_adapter
from qlora_kit.recipe import LoraSpec, ModelSpec, QuantizationSpec

NUM_TOKENS = 128
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        **options,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=NUM_TOKENS,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=NUM_TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    ),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<eos>", "<pad>", "user", "assistant"]
    words += [f"w{number}" for number in range(NUM_TOKENS - len(words))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A random model whose biases and norms are not the trivial ones of a fresh one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = model.to(dtype)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture
def base_folder(tmp_path: Path) -> Callable[..., Path]:
    def make(kind: str = "llama", **options: Any) -> Path:
        folder = tmp_path / kind
        save_model(folder, CONFIGS[kind](), **options)
        return folder

    return make


@dataclass(frozen=True)
class Tuned:
    """An adapter in memory on its base, and on disk."""

    base: Base
    model: PeftModel
    trained: TrainedAdapter

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            return self.model(input_ids=input_ids).logits


def save_fused_model(folder: Path) -> None:
    """One whose projections are tensors of their own on disk, and one in memory."""
    config = AutoConfig.for_model(
        "hrm_text",
        vocab_size=NUM_TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=None,
    )
    save_model(folder, config)


def load(
    folder: Path,
    quantization: QuantizationSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> Base:
    base = load_base(
        ModelSpec(name_or_path=str(folder)),
        quantization or QuantizationSpec(),
        dtype,
        "a test",
        probe_hardware(),
    )
    prepare_for_training(base.model, upcast_norms=False)
    return base


def shake(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Give every trainable parameter values that matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.add_(noise.to(parameter.dtype))


def tune(
    folder: Path,
    adapter_folder: Path,
    lora: LoraSpec | None = None,
    quantization: QuantizationSpec | None = None,
    dtype: torch.dtype = torch.float32,
    recipe_sha256: str = "0" * 64,
) -> Tuned:
    """Attach an adapter, give it random values, save it."""
    quantization = quantization or QuantizationSpec()
    base = load(folder, quantization, dtype)
    model = attach_adapter(base, lora or LoraSpec(r=4), seed=0).model
    shake(model)
    save_adapter(model, base, quantization, recipe_sha256, adapter_folder)
    trained = trained_adapter(
        adapter_folder, base, quantization, ModelSpec(name_or_path=str(folder))
    )
    return Tuned(base, model, replace(trained))


def reload_logits(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """What plain transformers makes of a folder, in float32 on every processor."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    never_repacked(model)
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def some_ids(num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    return torch.randint(0, num_tokens, (2, 24), generator=torch.Generator().manual_seed(2))
