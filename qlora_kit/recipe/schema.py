"""The JSON schema that editors complete recipes from, made of the fields' docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from importlib import resources
from typing import Any

from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.recipe import Recipe

SCHEMA_FILE = "recipe.schema.json"


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe, generated from the specs."""
    schema = Recipe.model_json_schema()
    definitions = {spec.__name__: spec for spec in Spec.__subclasses__()}
    _describe(schema, Recipe)
    for name, part in schema["$defs"].items():
        _describe(part, definitions[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as it is shipped."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def shipped_schema() -> str:
    """Text of the shipped schema file; a test holds it equal to `schema_text()`."""
    return (resources.files("qlora_kit.recipe") / SCHEMA_FILE).read_text(encoding="utf-8")


def field_docs(spec: type[Spec]) -> dict[str, str]:
    """The docstring under each field of a spec, those that it inherits among them, on one line.

    pydantic can do this while a class is made (`use_attribute_docstrings`), but that parses
    every spec's source at each start of the program, about 0.1 s of it, for a text that only
    the schema needs.
    """
    docs: dict[str, str] = {}
    for one in reversed(spec.__mro__):
        if issubclass(one, Spec):
            docs |= _own_field_docs(one)
    return docs


def _own_field_docs(spec: type[Spec]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(spec))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs


def _describe(schema: dict[str, Any], spec: type[Spec]) -> None:
    docs = field_docs(spec)
    schema["description"] = " ".join(str(spec.__doc__).split())
    for name, field in schema["properties"].items():
        field.pop("title", None)
        field["description"] = docs[name]
