"""Unsloth by its own loader and TRL's SFTTrainer, as its notebooks have it. It needs a GPU.

Unsloth patches transformers, PEFT and TRL when it is imported, which has to come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_bench.sides.trl import configuration
from train_bench.told import Told, trainer_clock
from train_bench.work import ALPHA, RANK, Work

SEED = 0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train(work: Work, folder: Path) -> Told:
    """The trainer's own loop over rows that are tokens already."""
    from unsloth import FastLanguageModel  # isort: skip
    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(**loading(work))
    model = FastLanguageModel.get_peft_model(model, **adapting(work))
    first = load_file(str(Path(work.adapter) / "adapter_model.safetensors"))
    missed = set_peft_model_state_dict(model, first).unexpected_keys
    if missed:
        raise SystemExit(f"Unsloth's adapter has no place for {missed[:3]}.")
    told = Told()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**configuration(work, folder)),
        train_dataset=Dataset.from_list([row for update in work.updates for row in update]),
        processing_class=tokenizer,
        callbacks=[trainer_clock(told)],
    )
    trainer.train()
    told.recomputes = recomputing(work) or "none"
    return told


def loading(work: Work) -> dict[str, Any]:
    """Of `FastLanguageModel.from_pretrained`: NF4, double quantization, as it always has."""
    import torch

    return {
        "model_name": work.model,
        "max_seq_length": work.longest,
        "dtype": torch.bfloat16 if work.precision == "bf16" else torch.float32,
        "load_in_4bit": True,
        "local_files_only": True,
    }


def adapting(work: Work) -> dict[str, Any]:
    """Of `FastLanguageModel.get_peft_model`."""
    return {
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(PROJECTIONS),
        "use_gradient_checkpointing": {"unsloth": "unsloth", "all": True}.get(
            recomputing(work), False
        ),
        "random_state": SEED,
    }


def recomputing(work: Work) -> str:
    """Left to itself, what its notebooks ask for: activations that wait in the host's memory."""
    return {"auto": "unsloth", "all": "all", "none": ""}[work.recompute]
