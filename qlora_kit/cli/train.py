"""`qlora-kit train RECIPE`: the straight line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.arguments import AsJson, Overrides, RecipePath

NAME = "train"


def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train into a new folder; nothing is deleted.")
    ] = False,
    allow_drift: Annotated[
        bool,
        typer.Option(
            "--allow-drift",
            help="Go on with a run whose recipe, data or base changed; says what that costs.",
        ),
    ] = False,
    profile_startup: Annotated[
        bool,
        typer.Option(
            "--profile-startup",
            help="Show what the time from the command to the first update went into.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate, and export what the recipe says; an unfinished run is gone on with."""
    from qlora_kit.train.requests import nothing_to_save_yet

    with nothing_to_save_yet():
        _train(recipe, tuple(overrides or ()), fresh, allow_drift, profile_startup, as_json)


def _train(
    recipe: Path,
    overrides: tuple[str, ...],
    fresh: bool,
    allow_drift: bool,
    profile_startup: bool,
    as_json: bool,
) -> None:
    from qlora_kit.checkpoint.run_directory import finished_run, left_behind
    from qlora_kit.cli.console import console_reporter
    from qlora_kit.environment import launched
    from qlora_kit.errors import RunStopped
    from qlora_kit.preflight import load_checked
    from qlora_kit.processes import same_everywhere
    from qlora_kit.report import narrate
    from qlora_kit.report.reporter import SILENT
    from qlora_kit.startup import UNTIMED, Startup

    with same_everywhere():
        loaded = load_checked(recipe, overrides)
    is_main = launched()[0] == 0
    reporter = console_reporter(to_stderr=as_json) if is_main else SILENT
    laps = Startup(partial(narrate.startup, reporter)) if profile_startup and is_main else UNTIMED
    laps.lap("python, recipe and its files")
    if fresh and Path(loaded.run_dir).exists():
        from qlora_kit.stages.folder import in_fresh_folder

        loaded = in_fresh_folder(loaded)
        reporter.say(
            f"--fresh trains into {loaded.run_dir}. If that run is cut short, go on with it by "
            f"run_dir={loaded.run_dir} in place of --fresh."
        )
    finished = None if fresh else finished_run(loaded)
    if finished is not None:
        reporter.say(f"{finished.folder} is finished; --fresh trains again into a new folder.")
        narrate.summary(reporter, finished, loaded)
        values = json.loads(finished.summary.read_text(encoding="utf-8"))
    else:
        from qlora_kit.run import run_recipe

        laps.lap("imports")
        try:
            result = run_recipe(
                loaded, reporter, allow_drift=allow_drift, laps=laps, ends_process=True
            )
        except RunStopped as stopped:
            reporter.warn(f"stopped by {stopped.signal_name}. {stopped.left_behind}")
            raise typer.Exit(128 + stopped.signal_number) from None
        except KeyboardInterrupt:
            reporter.warn(f"interrupted. {left_behind(loaded)}")
            raise typer.Exit(130) from None
        if result is None:
            return  # the main process tells
        values = json.loads(result.run.summary.read_text(encoding="utf-8"))
    if as_json and is_main:
        print(json.dumps(values, indent=2))
    raise typer.Exit(0 if values["holds"] else 1)
