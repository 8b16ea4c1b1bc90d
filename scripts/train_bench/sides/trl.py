"""TRL's SFTTrainer, whose adapter is put back to float32 so that losses can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_bench.told import Told, trainer_clock
from train_bench.work import Work


def train(work: Work, folder: Path) -> Told:
    """The trainer's own loop over rows that are tokens already."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from train_bench.sides.plain import quantized_with_adapter

    torch.set_num_threads(work.threads)
    told = Told()
    trainer = SFTTrainer(
        model=quantized_with_adapter(work),
        args=SFTConfig(**configuration(work, folder)),
        train_dataset=Dataset.from_list([row for update in work.updates for row in update]),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[trainer_clock(told)],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return told


def configuration(work: Work, folder: Path) -> dict[str, Any]:
    """Of SFTConfig. Recomputation is left to TRL's default (on) unless the work says which."""
    values = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": len(work.updates),
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": work.optimizer,
        "max_length": None,
        "logging_steps": 1,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": work.precision == "bf16",
        "use_cpu": work.device == "cpu",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    if work.recompute != "auto":
        values["gradient_checkpointing"] = work.recompute == "all"
    return values
