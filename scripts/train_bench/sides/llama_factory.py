"""LLaMA-Factory by its own entry, `run_exp`, which is what `llamafactory-cli train` calls.

Its configuration reads the rows as the kit's tokens (`tokenized_path`) and goes on from the kit's
first adapter. It keeps the adapter in float32 and recomputes all layers unless told not to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_bench.told import Told, trainer_clock
from train_bench.work import Work


def train(work: Work, folder: Path) -> Told:
    """`run_exp` with a callback that takes times and losses."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    rows = Dataset.from_list(work.rows)
    DatasetDict({"train": rows}).save_to_disk(str(folder / "llama-factory-rows"))
    told = Told()
    run_exp(configuration(work, folder), callbacks=[trainer_clock(told)])
    return told


def configuration(work: Work, folder: Path) -> dict[str, Any]:
    """What would stand in the YAML file of `llamafactory-cli train`."""
    values: dict[str, Any] = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": work.model,
        "adapter_name_or_path": work.adapter,
        "finetuning_type": "lora",
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "quantization_type": "nf4",
        "double_quantization": True,
        "template": "empty",
        "dataset": "rows",
        "tokenized_path": str(folder / "llama-factory-rows"),
        "cutoff_len": work.longest,
        "disable_shuffling": True,
        "output_dir": str(folder / "llama-factory"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": len(work.updates),
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": work.optimizer,
        "bf16": work.precision == "bf16",
        "use_cpu": work.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if work.recompute != "auto":
        values["disable_gradient_checkpointing"] = work.recompute == "none"
    return values
