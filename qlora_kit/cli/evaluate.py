"""`qlora-kit evaluate RUN|MODEL`: figures on held-out rows, or on tasks of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qlora_kit.cli.arguments import AsJson, Force, Overrides, SubjectName, Text, Window
from qlora_kit.cli.options import evaluate as options
from qlora_kit.cli.reading import Rows, recipe_with_eval_rows, rows_of_text
from qlora_kit.errors import RunError

if TYPE_CHECKING:
    from qlora_kit.recipe import QuantizationSpec, Recipe

NAME = "evaluate"


def command(
    subject: SubjectName,
    overrides: Overrides = None,
    recipe: options.RecipeOfRows = None,
    text: Text = None,
    window: Window = 512,
    speed: options.Speed = False,
    tasks: options.Tasks = None,
    include_path: options.IncludePath = None,
    num_fewshot: options.NumFewshot = None,
    limit: options.Limit = None,
    chat: options.Chat = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run (base and tuned side by side) or any model on held-out rows."""
    from qlora_kit.checkpoint.run_directory import is_run
    from qlora_kit.preflight import looks_local

    folder = Path(subject).expanduser()
    if looks_local(subject) and not folder.exists():
        raise RunError(f"{folder} does not exist.")
    if text is not None and (recipe is not None or overrides):
        raise typer.BadParameter("--text stands for a recipe; name one of the two.")
    if tasks is not None:
        if recipe is not None or overrides or text is not None:
            raise typer.BadParameter("--tasks brings its own rows; leave recipe and text out.")
        if speed:
            raise typer.BadParameter("--speed is measured beside eval rows; leave --tasks out.")
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        _ask_tasks(subject, names, include_path, num_fewshot, limit, chat, force, as_json)
        return
    if include_path or limit or chat or num_fewshot is not None:
        raise typer.BadParameter(
            "--include-path, --num-fewshot, --limit and --chat are for --tasks; name some."
        )
    run = folder if is_run(folder) else None
    quantization, keeps = None, None
    if text is not None:
        rows = rows_of_text(text, window)
    else:
        loaded = _recipe_of_rows(subject, run, recipe, overrides or [])
        rows = Rows(loaded.evaluate, loaded.data, None if run is not None else loaded.model)
        quantization = loaded.quantization
        keeps = run if recipe is None and not overrides else None
    _measure(subject, rows, quantization, speed, keeps, force, as_json)


def _recipe_of_rows(
    subject: str, run: Path | None, path: Path | None, overrides: list[str]
) -> Recipe:
    """The recipe that is named, or else the run's own; it has eval rows."""
    if path is None and run is not None:
        path = run / "recipe.yaml"
    if path is None:
        raise typer.BadParameter(
            f"{subject} is not a run, so its eval rows are not known; name a recipe that has some "
            "with --recipe RECIPE, or a text with --text FILE."
        )
    return recipe_with_eval_rows(path, overrides)


def _measure(
    subject: str,
    rows: Rows,
    quantization: QuantizationSpec | None,
    speed: bool,
    keeps: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """On these rows; `keeps` is the run whose record this is, without `speed`, which is of this
    machine.
    """
    from qlora_kit.checkpoint.run_directory import RunDirectory, write_json
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.data.prepare import prepare_eval
    from qlora_kit.data.read import require_readable
    from qlora_kit.evaluate.cost import once_used, open_measured
    from qlora_kit.evaluate.held_out import evaluate_held_out
    from qlora_kit.evaluate.speed import SpeedPlan
    from qlora_kit.report import comparison, narrate

    require_readable(rows.data.eval)
    reporter = console_reporter(to_stderr=as_json)
    plan = SpeedPlan() if speed else None
    tested, cost = open_measured(subject, rows.model, force, plan, reporter)
    part = prepare_eval(rows.data, tested.tokenizer, tested.stop_ids)
    values = evaluate_held_out(tested, part, rows.evaluate, rows.data, reporter)
    if keeps is not None:
        write_json(RunDirectory(keeps).evaluation, values)
    cost = once_used(cost, tested)
    if as_json:
        shown = values | {"cost": cost.as_dict()} if speed else values
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return
    if speed:
        comparison.takes(reporter, subject, cost)
    narrate.evaluation(reporter, values, quantization)
    narrate.samples(reporter, values.get("tuned") or values["model"])


def _ask_tasks(
    subject: str,
    names: tuple[str, ...],
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    chat: bool,
    force: bool,
    as_json: bool,
) -> None:
    """By lm-eval; of a run the tuned model is asked."""
    from qlora_kit.extras import require_extra

    require_extra("lm-eval", "evaluate --tasks")
    if not names:
        raise typer.BadParameter("--tasks names no task.")
    if include_path is not None and not include_path.is_dir():
        raise typer.BadParameter(f"--include-path {include_path} is no folder.")
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.evaluate.tasks import TaskPlan, evaluate_tasks, require_tasks
    from qlora_kit.report.comparison import task_figures
    from qlora_kit.runtime.open import open_runtime

    reporter = console_reporter(to_stderr=as_json)
    plan = TaskPlan(names, include_path, num_fewshot, limit, chat)
    manager = require_tasks(plan)
    values = evaluate_tasks(open_runtime(subject, None, force, reporter), plan, manager, reporter)
    if as_json:
        print(json.dumps({"tasks": values}, indent=2, ensure_ascii=False))
    else:
        task_figures(reporter, values)
