"""`qlora-kit evaluate RUN|MODEL`: perplexity and exact match on held-out rows."""

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
    from qlora_kit.report import narrate
    from qlora_kit.run import evaluate_held_out
    from qlora_kit.runtime.open import open_runtime

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
