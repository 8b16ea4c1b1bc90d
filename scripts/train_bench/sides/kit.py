"""`qlora-kit train`, from the recipe to the end of training."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from qlora_kit.recipe import load_recipe
from qlora_kit.report.reporter import Progress, Reporter
from qlora_kit.run import run_recipe
from train_bench.told import Told, moment
from train_bench.work import Work


class Clock(Progress):
    """Takes the time at the end of each update."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def update(self, advance: int = 1, **fields: str) -> None:
        """One update has ended."""
        self.told.ends.append(moment())


class Listening(Reporter):
    """Prints what is said, and gives training a clock for its bar."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def progress(self, name: str, total: int) -> AbstractContextManager[Progress]:
        """The clock for training; nothing for the rest."""
        return nullcontext(Clock(self.told) if name == "training" else Progress())

    def say(self, text: str) -> None:
        """Into the log of this side."""
        print(text, flush=True)


def train(work: Work, folder: Path) -> Told:
    """The run of the recipe; its losses are read from its log."""
    told = Told(recomputes=work.recompute)
    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "run", ignore_errors=True)
    run_recipe(load_recipe(folder / "recipe.yaml"), Listening(told))
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    told.losses = [line["loss"] for line in lines if "loss" in line]
    return told
