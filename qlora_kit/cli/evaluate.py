"""`qlora-kit evaluate RUN|MODEL`: figures on held-out rows, or on tasks of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qlora_kit.cli.arguments import AsJson, Force, Overrides, SubjectName
from qlora_kit.cli.options import evaluate as options
from qlora_kit.cli.reading import recipe_with_eval_rows
from qlora_kit.errors import RunError

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe

NAME = "evaluate"


def command(
    subject: SubjectName,
    overrides: Overrides = None,
    recipe: options.RecipeOfRows = None,
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
    if tasks is not None:
        if recipe is not None or overrides:
            raise typer.BadParameter("--tasks brings its own rows; leave the recipe out.")
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        _ask_tasks(subject, names, include_path, num_fewshot, limit, chat, force, as_json)
        return
    if include_path or limit or chat or num_fewshot is not None:
        raise typer.BadParameter(
            "--include-path, --num-fewshot, --limit and --chat are for --tasks; name some."
        )
    run = folder if is_run(folder) else None
    loaded = _recipe_of_rows(subject, run, recipe, overrides or [])
    keeps = run if recipe is None and not overrides else None
    _measure(subject, loaded, run is not None, keeps, force, as_json)


def _recipe_of_rows(
    subject: str, run: Path | None, path: Path | None, overrides: list[str]
) -> Recipe:
    """The recipe that is named, or else the run's own; it has eval rows."""
    if path is None and run is not None:
        path = run / "recipe.yaml"
    if path is None:
        raise typer.BadParameter(
            f"{subject} is not a run, so its eval rows are not known; name a recipe that has some "
            "with --recipe RECIPE."
        )
    return recipe_with_eval_rows(path, overrides)


def _measure(
    subject: str, recipe: Recipe, is_of_run: bool, keeps: Path | None, force: bool, as_json: bool
) -> None:
    """On the recipe's eval rows; `keeps` is the run whose record this is."""
    from qlora_kit.checkpoint.run_directory import RunDirectory, write_json
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.data.prepare import prepare_eval
    from qlora_kit.data.read import require_readable
    from qlora_kit.evaluate.held_out import evaluate_held_out
    from qlora_kit.report import narrate
    from qlora_kit.runtime.open import open_runtime

    require_readable(recipe.data.eval)
    reporter = console_reporter(to_stderr=as_json)
    tested = open_runtime(subject, None if is_of_run else recipe.model, force, reporter)
    part = prepare_eval(recipe.data, tested.tokenizer, tested.stop_ids)
    values = evaluate_held_out(tested, part, recipe, reporter)
    if keeps is not None:
        write_json(RunDirectory(keeps).evaluation, values)
    if as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        narrate.evaluation(reporter, values, recipe.quantization)
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
