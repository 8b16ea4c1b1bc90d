"""`qlora-kit plan RECIPE`: what it will need, before anything is loaded or trained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.arguments import AsJson, Overrides, RecipePath, parse_bytes

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.recipe import Recipe

NAME = "plan"


def command(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(help='Plan for this GPU, such as "RTX 4090", not this machine.')
    ] = None,
    gpus: Annotated[
        int, typer.Option(min=1, help="How many of --gpu there are, each with the model.")
    ] = 1,
    budget: Annotated[
        str | None, typer.Option(help="Plan for so much memory: 20GiB. Unset: what there is.")
    ] = None,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="Read the rows, and plan for the longest that there are."),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="First measure what this machine does a second, by a short training run.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a recipe will need, by component and phase, whether it fits, and what to change."""
    from qlora_kit.errors import RecipeError
    from qlora_kit.preflight import preflight
    from qlora_kit.recipe import load_recipe

    if calibrate and gpu is not None:
        raise typer.BadParameter("--calibrate measures this machine; leave --gpu out.")
    if gpu is None and gpus > 1:
        raise typer.BadParameter(f"--gpus {gpus} says how many of --gpu there are; name that one.")
    asked_bytes = None if budget is None else parse_bytes(budget)
    loaded = load_recipe(recipe, overrides or ())
    faults = preflight(loaded)
    if faults:
        raise RecipeError(str(recipe), faults)
    from qlora_kit.environment import probe_hardware
    from qlora_kit.plan.gpus import known_gpu

    hardware = probe_hardware() if gpu is None else known_gpu(gpu, gpus)

    from qlora_kit.cli.console import console_reporter
    from qlora_kit.model.vocabulary import load_vocabulary
    from qlora_kit.plan.plan import Planner
    from qlora_kit.plan.rows import train_rows
    from qlora_kit.plan.suggest import suggestions
    from qlora_kit.report import plan as report
    from qlora_kit.report.reporter import SILENT

    vocabulary = load_vocabulary(loaded.model)
    available = _there_is(loaded, hardware) if asked_bytes is None else asked_bytes
    planner = Planner(vocabulary, hardware, available)
    train = train_rows(loaded, vocabulary) if rows else None
    if calibrate:
        planner.calibrate(_precision(loaded, hardware))
    reporter = SILENT if as_json else console_reporter()
    reporter.say(
        "counting  what a step takes, on tensors without numbers; a large model takes a while"
    )
    found = planner.plan(loaded, train)
    report.plan(reporter, found, rows)
    # Each is a plan of its own, which for a large model takes longer than anyone likes to wait.
    changes = [] if found.fits else suggestions(loaded, found, planner, train)
    if not found.fits:
        report.suggestions(reporter, changes)
    if as_json:
        values = {
            "recipe": str(recipe),
            **found.as_dict(),
            "suggestions": [one.as_dict() for one in changes],
        }
        print(json.dumps(values, indent=2))
    raise typer.Exit(0 if found.fits else 1)


def _there_is(recipe: Recipe, hardware: Hardware) -> int:
    """Bytes that one device may use."""
    from qlora_kit.train.memory import device_bytes

    there = device_bytes(hardware)
    limit = recipe.train.max_memory_mib
    return there if limit is None else min(there, limit * 2**20)


def _precision(recipe: Recipe, hardware: Hardware) -> str:
    from qlora_kit.train.arguments import resolve_training_dtypes

    return resolve_training_dtypes(recipe, hardware).precision
