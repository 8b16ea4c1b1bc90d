"""The work that every side does: model, first values of the adapter, rows, settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plainly import Fault

if TYPE_CHECKING:
    from qlora_kit.data.sequences import TokenSequence

RANK, ALPHA, RATE = 16, 32, 2e-4
_OF_OTHER_HEADS = ("classifier", "summary")


@dataclass(frozen=True)
class Work:
    """What every side does, as a file that it reads."""

    model: str
    adapter: str
    batch: int
    accumulation: int
    recompute: str
    precision: str
    device: str
    """`cpu` or `cuda`."""
    threads: int
    optimizer: str
    """As transformers calls it: `adamw_torch` or `sgd`."""
    learning_rate: float
    updates: list[list[dict[str, list[int]]]]
    """Rows of each update, with `input_ids` and `labels`."""

    @property
    def rows(self) -> list[dict[str, list[int]]]:
        """All rows in their order, with the mask that other tools ask for."""
        return [
            {**row, "attention_mask": [1] * len(row["input_ids"])}
            for update in self.updates
            for row in update
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row["input_ids"]) for row in self.rows)

    @property
    def real_tokens(self) -> list[int]:
        return [sum(len(row["input_ids"]) for row in update) for update in self.updates]

    @property
    def supervised_tokens(self) -> list[int]:
        return [
            sum(label != -100 for row in update for label in row["labels"][1:])
            for update in self.updates
        ]


def prepared(arguments: argparse.Namespace, folder: Path) -> tuple[Work, dict[str, Any]]:
    """The work, as the kit renders the rows and begins the adapter, and the recipe for it."""
    from qlora_kit.environment import probe_hardware
    from qlora_kit.processes import ALONE
    from qlora_kit.recipe import load_recipe
    from qlora_kit.report.reporter import SILENT
    from qlora_kit.stages.prepare import prepare

    values = recipe_of(arguments, folder / "run")
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    recipe = load_recipe(path)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    ready.adapted.model.save_pretrained(folder / "adapter")
    base = without_dropout(Path(ready.base.source.folder), folder / "base")
    if base != Path(ready.base.source.folder):
        values["model"]["name_or_path"] = str(base)
        path.write_text(json.dumps(values))
    work = Work(
        model=str(base),
        adapter=str(folder / "adapter"),
        batch=arguments.batch,
        accumulation=arguments.accumulation,
        recompute=arguments.recompute,
        precision=arguments.precision,
        device=arguments.device,
        threads=arguments.threads,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        updates=dealt(ready.train.sequences, arguments),
    )
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    if arguments.device != "cpu":
        import torch

        del ready
        torch.cuda.empty_cache()
    return work, values


def without_dropout(base: Path, folder: Path) -> Path:
    """The base itself where it has no dropout; else `folder`, with the same files and the dropout
    of its configuration set to 0: each side would draw other numbers, and losses could not be
    compared.
    """
    from transformers import AutoConfig

    found = {
        name: value
        for name, value in AutoConfig.from_pretrained(base).to_dict().items()
        if "drop" in name and not name.startswith(_OF_OTHER_HEADS)
        if isinstance(value, float) and value > 0
    }
    if not found:
        return base
    folder.mkdir()
    for one in base.iterdir():
        if one.name != "config.json":
            (folder / one.name).symlink_to(one.resolve())
    written = json.loads((base / "config.json").read_text(encoding="utf-8"))
    off = json.dumps({**written, **dict.fromkeys(found, 0.0)})
    (folder / "config.json").write_text(off, encoding="utf-8")
    told = ", ".join(f"{name} {value:g}" for name, value in found.items())
    print(f"The model's dropout ({told}) is switched off for every side.", flush=True)
    return folder


def recipe_of(arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """What the kit trains by."""
    rows = arguments.rows or "demo/commands"
    return {
        "model": {"name_or_path": arguments.model},
        "quantization": {"load_in_4bit": True, "quant_type": "nf4", "double_quant": True},
        "lora": {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {"train": [{"path": rows}], "max_length": arguments.max_length},
        "train": {
            "learning_rate": arguments.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_steps": arguments.updates,
            "per_device_train_batch_size": arguments.batch,
            "gradient_accumulation_steps": arguments.accumulation,
            "optim": arguments.optimizer,
            "train_sampling_strategy": "sequential",
            "precision": arguments.precision,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": {"auto": "auto", "none": False, "all": True}[
                arguments.recompute
            ],
        },
        "evaluate": {"perplexity": False},
        "export": {"merge": False},
        "run_dir": str(run_dir),
    }


def dealt(
    sequences: Sequence[TokenSequence], arguments: argparse.Namespace
) -> list[list[dict[str, list[int]]]]:
    """Rows of each update, in their order, and from the first on again after the last.

    Raises Fault where a pass over them would end within an update, which trainers end differently.
    """
    size = arguments.batch * arguments.accumulation
    if size * arguments.updates > len(sequences) and len(sequences) % size:
        raise Fault(
            f"{arguments.updates} updates of {size} rows take {size * arguments.updates} rows, got "
            f"{len(sequences)}: give so many, or a multiple of {size}, so that a pass over them "
            "ends with a whole update."
        )
    return [
        [
            {"input_ids": list(row.input_ids), "labels": list(row.labels)}
            for row in (sequences[(n * size + k) % len(sequences)] for k in range(size))
        ]
        for n in range(arguments.updates)
    ]
