"""`qlora-kit compare A B [C …]`: size, memory, speed and quality side by side."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from qlora_kit.cli.arguments import AsJson, Force, Text, Window
from qlora_kit.cli.options import compare as options
from qlora_kit.cli.reading import Rows, recipe_with_eval_rows, rows_of_text
from qlora_kit.errors import RecipeError, RunError

NAME = "compare"


def command(
    models: options.Models,
    recipe: options.RecipeOfRows = None,
    text: Text = None,
    settings: options.Settings = None,
    window: Window = 512,
    max_tokens: options.MaxTokens = 4096,
    prompt_tokens: options.PromptTokens = 256,
    new_tokens: options.NewTokens = 32,
    repetitions: options.Repetitions = 5,
    plot: options.Plot = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure several models, each alone in a process, and show them side by side."""
    _require_several(models)
    _require_picture(plot)
    if text is None:
        rows = _rows_of(models, recipe, settings or [])
    elif recipe is not None or settings:
        raise typer.BadParameter("--text stands for a recipe; name one of the two.")
    else:
        rows = rows_of_text(text, window)

    from functools import partial
    from tempfile import gettempdir

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.evaluate.compare import compare_models
    from qlora_kit.evaluate.one import Task
    from qlora_kit.evaluate.speed import SpeedPlan
    from qlora_kit.report.comparison import comparison
    from qlora_kit.report.plot import plot as draw

    task = Task(
        evaluate=rows.evaluate,
        data=rows.data,
        scratch=Path(gettempdir()),
        max_tokens=max_tokens,
        model=rows.model,
        speed=SpeedPlan(prompt_tokens, new_tokens, repetitions) if repetitions else None,
        force=force,
        make_reporter=partial(console_reporter, to_stderr=as_json),
    )
    found = compare_models(models, task)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
    else:
        comparison(console_reporter(), found)
    if plot is not None:
        draw(found, plot)
    raise typer.Exit(1 if found.failures else 0)


def _require_several(models: list[str]) -> None:
    """Two models or more, of which those that are paths are there."""
    from qlora_kit.preflight import looks_local

    if len(models) < 2:
        raise typer.BadParameter("name two models or more; `evaluate MODEL --speed` measures one.")
    for name in models:
        if looks_local(name) and not Path(name).expanduser().exists():
            raise RunError(f"{name} does not exist.")


def _require_picture(plot: Path | None) -> None:
    from qlora_kit.atomic import draft_beside
    from qlora_kit.report.plot import SUFFIXES

    if plot is not None and plot.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--plot ends in {', '.join(SUFFIXES)}, got {plot.name}.")
    if plot is not None and plot.is_dir():
        raise typer.BadParameter(f"--plot {plot} is a folder.")
    if plot is not None:
        with draft_beside(plot):
            pass


def _rows_of(models: list[str], path: Path | None, settings: list[str]) -> Rows:
    """The eval rows of a recipe, or of the first run's; looked up."""
    from qlora_kit.checkpoint.run_directory import is_run
    from qlora_kit.preflight import data_faults

    runs = [Path(name).expanduser() for name in models if is_run(Path(name).expanduser())]
    if path is None and not runs:
        raise typer.BadParameter(
            "none of these is a run, so the eval rows are not known; name a recipe that has some "
            "with --recipe RECIPE, or a text with --text FILE."
        )
    if path is None:
        path = runs[0] / "recipe.yaml"
    loaded = recipe_with_eval_rows(path, settings)
    faults = [fault for fault in data_faults(loaded) if fault.path.startswith("data.eval")]
    if faults:
        raise RecipeError(str(path), faults)
    return Rows(loaded.evaluate, loaded.data, loaded.model)
