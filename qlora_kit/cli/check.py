"""`qlora-kit check RECIPE`: every fault of a recipe at once, in under a second."""

from __future__ import annotations

import json

import typer

from qlora_kit.cli.arguments import AsJson, Overrides, RecipePath
from qlora_kit.errors import RecipeError

NAME = "check"


def command(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Find every fault of a recipe at once, without loading anything."""
    from qlora_kit.preflight import load_checked

    try:
        load_checked(recipe, overrides or ())
    except RecipeError as error:
        if as_json:
            found = [vars(fault) for fault in error.faults]
            print(json.dumps({"recipe": str(recipe), "faults": found}, indent=2))
            raise typer.Exit(1) from None
        raise
    if as_json:
        print(json.dumps({"recipe": str(recipe), "faults": []}, indent=2))
    else:
        print(f"{recipe} is fine.")
