"""Tiny models that say something, in reference precision, and rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_llama, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.model.base import Base, load_base
from qlora_kit.recipe import ModelSpec, QuantizationSpec

SIXTEEN = QuantizationSpec(load_in_4bit=False)


def wide_llama(folder: Path, num_layers: int = 3) -> Path:
    """Weights wide enough that logits differ, and quantizing them with it."""
    return build_llama(folder, tied=False, initializer_range=0.3, num_hidden_layers=num_layers)


def another(folder: Path, model_type: str, **values: Any) -> Path:
    """A random model of another architecture."""
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=384, bos_token_id=1, eos_token_id=2, pad_token_id=0, **values
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, quantization: QuantizationSpec = SIXTEEN) -> Base:
    spec = ModelSpec(name_or_path=str(folder))
    return load_base(spec, quantization, torch.float32, "a test", probe_hardware())


def some_rows(count: int = 5, length: int = 20, seed: int = 3) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 300, (length - number % 8,), generator=generator).tolist()
        labels = [IGNORE_INDEX if place % 5 == 0 else token for place, token in enumerate(ids)]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"row {number}"))
    return made
