"""`key=value` on the command line as a method's options, with every fault at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.quantize.method import Method, MethodOptions
from qlora_kit.recipe.base import all_contradictions
from qlora_kit.recipe.faults import show
from qlora_kit.recipe.shape import members, words
from qlora_kit.recipe.yaml import parse_yaml


def parse_options(method: Method, texts: Sequence[str]) -> MethodOptions:
    """Each text is `key=value`, the value read as YAML.

    Raises:
        RecipeError: holds every fault found, each with its key, what was got, what to do.
    """
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            faults.append(Fault("", f"{text!r} is not key=value", _known(method.options)))
            continue
        try:
            values[key] = parse_yaml(value, key)
        except RecipeError as error:
            faults += [Fault(key, fault.message, fault.hint) for fault in error.faults]
    options: MethodOptions | None = None
    try:
        options = method.options.model_validate_json(json.dumps(values), strict=True)
        faults += all_contradictions(options)
    except ValidationError as error:
        faults += [_fault(method.options, details) for details in error.errors(include_url=False)]
    if faults or options is None:
        raise RecipeError(f"--method {method.name}", list(dict.fromkeys(faults)))
    return options


def describe_options(options: type[MethodOptions]) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each."""
    from qlora_kit.recipe.schema import field_docs

    docs = field_docs(options)
    for name, field in options.model_fields.items():
        yield (
            name,
            _yaml(field.get_default(call_default_factory=True, validated_data={})),
            docs[name],
        )


def _fault(options: type[MethodOptions], details: ErrorDetails) -> Fault:
    key = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, options.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else _known(options)
        return Fault(key, "is no option of this method", hint)
    field = options.model_fields[key]
    got = show(details["input"])
    annotation = members(field.annotation)[0]
    if get_origin(annotation) is Literal:
        choices = ", ".join(_yaml(choice) for choice in get_args(annotation))
        return Fault(
            key, f"must be one of {choices}; got {got}", f"the default is {_default(field)}"
        )
    if details["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        said = details["msg"].removeprefix("Input should be ")
        return Fault(key, f"must be {said}, got {got}", f"the default is {_default(field)}")
    expected = "a path" if Path in members(field.annotation) else words(field.annotation)
    return Fault(key, f"must be {expected}, got {got}", f"the default is {_default(field)}")


def _known(options: type[MethodOptions]) -> str:
    names = ", ".join(options.model_fields)
    return f"it has {names}" if names else "this method has no options"


def _default(field: Any) -> str:
    return _yaml(field.get_default(call_default_factory=True, validated_data={}))


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value)
