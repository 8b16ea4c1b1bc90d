"""A small random model and a recipe that trains it, for calibrating."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_kit.recipe import Recipe, load_recipe

NUM_TOKENS = 512
"""Of a micro-batch."""
_NUM_ROWS, _NUM_STEPS = 2, 8
_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}


def small_recipe(folder: Path, precision: str) -> Recipe:
    """Write model, rows and recipe; the recipe's run is `run` in the same folder."""
    _write_model(folder / "model")
    length = NUM_TOKENS // _NUM_ROWS
    prompt = "?" * (length // 2)
    row = json.dumps({"prompt": prompt, "completion": "a" * (2 * length)})
    (folder / "rows.jsonl").write_text(f"{row}\n" * _NUM_ROWS, encoding="utf-8")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    values = {
        "model": {"name_or_path": str(folder / "model")},
        "quantization": {"compute_dtype": dtype},
        "lora": {"r": 16},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}],
            "max_length": length,
            "overlength": "truncate",
            "duplicates": "keep",
        },
        "train": {
            "max_steps": _NUM_STEPS,
            "warmup_steps": 0,
            "per_device_train_batch_size": _NUM_ROWS,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "precision": precision,
            "save_strategy": "no",
            "logging_steps": 1,
        },
        "evaluate": {"perplexity": False},
        "export": {"merge": False},
        "run_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(path)


def save_byte_tokenizer(folder: Path) -> None:
    """Of single bytes, with a token that pads and one that ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def _write_model(folder: Path) -> None:
    """Random weights, and a tokenizer of single bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_byte_tokenizer(folder)
    before = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(**_SIZES, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(before)
