"""Tiny models that say something, in reference precision, and rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import build_llama, load_tiny

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.model.base import Base
from qlora_kit.recipe import QuantizationSpec

from .tiny_sources import build

SIXTEEN = QuantizationSpec(load_in_4bit=False)


def wide_llama(folder: Path, num_layers: int = 3) -> Path:
    """Weights wide enough that logits differ, and quantizing them with it."""
    return build_llama(folder, tied=False, initializer_range=0.3, num_hidden_layers=num_layers)


def another(folder: Path, model_type: str, **values: Any) -> Path:
    """A random model of another architecture."""
    return build(folder, model_type, values, spread=0.1)


def load(folder: Path, quantization: QuantizationSpec = SIXTEEN) -> Base:
    return load_tiny(folder, quantization)


def some_rows(count: int = 5, length: int = 20, seed: int = 3) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, 300, (length - number % 8,), generator=generator).tolist()
        labels = [IGNORE_INDEX if place % 5 == 0 else token for place, token in enumerate(ids)]
        made.append(TokenSequence(tuple(ids), tuple(labels), f"row {number}"))
    return made
