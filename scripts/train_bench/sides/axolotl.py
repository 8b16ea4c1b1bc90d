"""Axolotl by its own entries: `load_cfg`, `load_datasets` and `train`, as `axolotl train` does.

Its configuration reads rows that are tokens already and goes on from the kit's first adapter. Its
schema recomputes nothing unless told to, but every example of QLoRA that it ships turns it on
(`gradient_checkpointing: true`): that is taken for its default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train_bench.told import Told
from train_bench.work import Work

GPU_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")
"""On by default where there is no dropout, but they call CUDA."""


def train(work: Work, folder: Path) -> Told:
    """Training as `axolotl train` does it; the clock comes in as a plugin of Axolotl's."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train as train_by_axolotl

    from train_bench.sides.axolotl_plugin import TOLD

    path = folder / "axolotl.yaml"
    path.write_text(json.dumps(configuration(work, folder)))
    with (folder / "axolotl-rows.jsonl").open("w") as lines:
        for row in work.rows:
            lines.write(json.dumps(row) + "\n")
    settings = load_cfg(str(path))
    rows = load_datasets(cfg=settings, cli_args=TrainerCliArgs())
    train_by_axolotl(cfg=settings, dataset_meta=rows)
    return TOLD


def configuration(work: Work, folder: Path) -> dict[str, Any]:
    """What would stand in the YAML file of `axolotl train`."""
    return {
        "base_model": work.model,
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_model_dir": work.adapter,
        "datasets": [{"path": str(folder / "axolotl-rows.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "axolotl-prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "sequence_len": work.longest,
        "val_set_size": 0,
        "plugins": ["train_bench.sides.axolotl_plugin.Watching"],
        "output_dir": str(folder / "axolotl"),
        "micro_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": len(work.updates),
        "num_epochs": 1,
        "learning_rate": work.learning_rate,
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optimizer": work.optimizer,
        "bf16": work.precision == "bf16",
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        **dict.fromkeys(GPU_KERNELS, False),
        "gradient_checkpointing": work.recompute != "none",
        "logging_steps": 1,
        "save_strategy": "no",
    }
