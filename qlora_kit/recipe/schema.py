"""The JSON schema that editors complete recipes from, made of the fields' docstrings."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from qlora_kit.recipe.recipe import Recipe

SCHEMA_FILE = "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, generated from the specs."""
    schema = Recipe.model_json_schema()
    schema["required"] = ["model", "data"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as it is shipped."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> str:
    """Text of the shipped schema file; a test holds it equal to `schema_text()`."""
    return (resources.files("qlora_kit.recipe") / SCHEMA_FILE).read_text(
        encoding="utf-8"
    )
