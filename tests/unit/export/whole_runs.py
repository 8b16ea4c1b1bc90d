"""Runs as training leaves them, of tiny models, and a reporter that remembers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.data.prepare import Part, prepare_eval
from qlora_kit.environment import probe_hardware
from qlora_kit.export.merge_run import merge_after_training
from qlora_kit.recipe import LoraSpec, Recipe, load_recipe, recipe_hash, save_recipe
from qlora_kit.report.reporter import Reporter

from .tiny_runs import CONFIGS, Tuned, save_model, tune


class Heard(Reporter):
    def __init__(self) -> None:
        self.tables: list[Sequence[Sequence[str]]] = []
        self.warnings: list[str] = []
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables.append(rows)


@dataclass(frozen=True)
class TinyRun:
    """A run as training leaves it."""

    run: RunDirectory
    recipe: Recipe
    tuned: Tuned
    held_out: Part

    def merge(self, reporter: Reporter | None = None) -> dict[str, Any] | None:
        return merge_after_training(
            self.tuned.model,
            self.tuned.base,
            self.held_out,
            self.recipe,
            self.run,
            probe_hardware(),
            reporter or Reporter(),
        )


def make_run(
    folder: Path, lora: LoraSpec | None = None, to: Sequence[str] = (), **merge_options: Any
) -> TinyRun:
    """Its last training row is a held-out one as well."""
    if not (folder / "base").exists():
        save_model(folder / "base", CONFIGS["llama-tied"]())
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w{i + 3}"},
                {"role": "assistant", "content": f"w{2 * i} w{i + 9} w7"},
            ]
        }
        for i in range(11)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, rows[5:])))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(folder / "base")},
                "data": {
                    "train": [{"path": str(folder / "more.jsonl")}],
                    "eval": [{"path": str(folder / "rows.jsonl")}],
                },
                "export": {"merge": True, "to": list(to), "merge_options": merge_options},
                "run_dir": str(folder / "run"),
            }
        )
    )
    recipe = load_recipe(folder / "recipe.yaml")
    run = RunDirectory(folder / "run")
    run.folder.mkdir()
    save_recipe(recipe, run.recipe)
    tuned = tune(folder / "base", run.adapter, lora, recipe_sha256=recipe_hash(recipe))
    held_out = prepare_eval(recipe.data, tuned.base.tokenizer, tuned.base.stop_ids)
    return TinyRun(run, recipe, tuned, held_out)
