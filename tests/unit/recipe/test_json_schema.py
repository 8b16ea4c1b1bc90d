"""The shipped JSON schema is the specs', and says what each field means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_kit.recipe import shape
from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.schema import field_docs, recipe_schema, schema_text, shipped_schema

SPECS = [Recipe, *Spec.__subclasses__()]

REWRITE = (
    'the specs have changed; rewrite it: python -c "from qlora_kit.recipe.schema import *; '
    "open('qlora_kit/recipe/' + SCHEMA_FILE, 'w').write(schema_text())\""
)


def test_the_shipped_schema_is_up_to_date() -> None:
    assert shipped_schema() == schema_text(), REWRITE


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.__name__)
def test_each_field_is_described(spec: type[Spec]) -> None:
    docs = field_docs(spec)
    assert set(docs) == set(spec.model_fields)
    assert all(len(text) > 10 and text.endswith(".") for text in docs.values()), docs


def properties(schema: dict[str, Any], part: dict[str, Any], path: str) -> Iterator[str]:
    """Dotted paths of all that the schema allows, following references."""
    while "$ref" in part:
        part = schema["$defs"][part["$ref"].removeprefix("#/$defs/")]
    for branch in part.get("anyOf", []):
        yield from properties(schema, branch, path)
    if "items" in part:
        yield from properties(schema, part["items"], f"{path}.0")
    for name, field in part.get("properties", {}).items():
        inner = f"{path}.{name}" if path else name
        yield inner
        yield from properties(schema, field, inner)


def test_the_schema_knows_exactly_the_recipes_keys() -> None:
    schema = json.loads(schema_text())
    assert sorted(properties(schema, schema, "")) == sorted(shape.all_paths())


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["model", "data"]
    assert schema["$schema"].endswith("2020-12/schema")
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        assert all(field["description"] for field in part["properties"].values())
    rank = schema["$defs"]["LoraSpec"]["properties"]["r"]
    assert rank["type"] == "integer"
    assert rank["exclusiveMinimum"] == 0
