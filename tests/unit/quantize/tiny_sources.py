"""Tiny random models on disk, opened as `quantize` opens them, and text in their vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import probe_hardware
from qlora_kit.quantize.method import Calibration, Made, Source
from qlora_kit.quantize.methods import resolve_method
from qlora_kit.quantize.options import parse_options
from qlora_kit.quantize.source import open_source
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT

NEW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**NEW, "tie_word_embeddings": False}),
    "qwen2: biases, tied": ("qwen2", {**NEW, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**NEW, "head_dim": 16, "sliding_window": 8}),
    "gpt2: Conv1D": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
MIXTURE = (
    "qwen3_moe",
    {
        **NEW,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
)
WORDS = ["turn", "the", "kitchen", "lamp", "percent", "please", "quick", "brown", "fox", "hello"]


def build(
    folder: Path,
    model_type: str,
    values: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    spread: float = 0.02,
) -> Path:
    """A random model whose biases and norms are not the trivial ones of a fresh one."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=384, bos_token_id=1, eos_token_id=2, pad_token_id=0, **values
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    model.to(dtype).save_pretrained(folder)
    return folder


def source_of(folder: Path) -> Source:
    return open_source(ModelSpec(name_or_path=str(folder)), probe_hardware())


def made_by(
    name: str, source: Source, draft: Path, *options: str, calibration: Calibration | None = None
) -> Made:
    """What a method makes of a source, after its own check."""
    method = resolve_method(name)
    parsed = parse_options(method, options)
    method.check(source, parsed)
    draft.mkdir()
    return method.make(source, parsed, calibration, draft, SILENT)


def reloaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """By transformers alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def some_ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=some_ids() if ids is None else ids, use_cache=False).logits


def sequences(count: int, length: int = 12, seed: int = 0) -> tuple[TokenSequence, ...]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 300, (count, length), generator=generator).tolist()
    return tuple(
        TokenSequence(tuple(row), tuple(row), f"rows:{number}") for number, row in enumerate(rows)
    )


def calibration(count: int = 4, seed: int = 0) -> Calibration:
    rows = sequences(count, seed=seed)
    return Calibration(rows, sum(row.num_tokens for row in rows), "random rows")


def text_file(path: Path, rows: int, seed: int = 0) -> Path:
    """A .jsonl file of plain texts that all differ."""
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            picks = torch.randint(len(WORDS), (10 + number % 7,), generator=generator).tolist()
            text = f"{number} " + " ".join(WORDS[pick] for pick in picks)
            file.write(json.dumps({"text": text}) + "\n")
    return path
