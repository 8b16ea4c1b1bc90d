"""`qlora-kit evaluate RUN|MODEL`: figures on held-out rows, or on tasks of lm-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.arguments import AsJson, Force, Overrides, SubjectName
from qlora_kit.errors import Fault, RecipeError, RunError

NAME = "evaluate"


def command(
    subject: SubjectName,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="The recipe whose data and evaluate sections are used; a run has its own."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,…", help="Ask these tasks of lm-eval instead of eval rows."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of your own tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question of a task.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask only the first rows of each task.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask tasks through the chat template.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure a run (base and tuned side by side) or any model on held-out rows."""
    from qlora_kit.checkpoint.run_directory import is_run
    from qlora_kit.preflight import looks_local
    from qlora_kit.recipe import load_recipe

    folder = Path(subject).expanduser()
    if looks_local(subject) and not folder.exists():
        raise RunError(f"{folder} does not exist.")
    if tasks is not None:
        if recipe is not None or overrides:
            raise typer.BadParameter("--tasks brings its own rows; leave the recipe out.")
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        _tasks(subject, names, include_path, num_fewshot, limit, chat, force, as_json)
        return
    if include_path or limit or chat or num_fewshot is not None:
        raise typer.BadParameter(
            "--include-path, --num-fewshot, --limit and --chat are for --tasks; name some."
        )
    own = folder / "recipe.yaml" if is_run(folder) else None
    path = recipe or own
    if path is None:
        raise typer.BadParameter(
            f"{subject} is not a run, so its eval rows are not known; name a recipe that has some "
            "with --recipe RECIPE."
        )
    loaded = load_recipe(path, overrides or ())
    if not loaded.data.has_eval_rows:
        raise RecipeError(
            str(path), [Fault("data.eval", "names no source to measure on", "add one")]
        )

    from qlora_kit.checkpoint.run_directory import RunDirectory, write_json
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.data.prepare import prepare_eval
    from qlora_kit.data.read import require_readable
    from qlora_kit.report import narrate
    from qlora_kit.run import evaluate_held_out
    from qlora_kit.runtime.open import open_runtime

    require_readable(loaded.data.eval)
    reporter = console_reporter(to_stderr=as_json)
    tested = open_runtime(subject, loaded.model if own is None else None, force, reporter)
    part = prepare_eval(loaded.data, tested.tokenizer, tested.stop_ids)
    values = evaluate_held_out(tested, part, loaded, reporter)
    if own is not None and not overrides and recipe is None:
        write_json(RunDirectory(folder).evaluation, values)
    if as_json:
        print(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        narrate.evaluation(reporter, values, loaded.quantization)
        narrate.samples(reporter, values.get("tuned") or values["model"])


def _tasks(
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
