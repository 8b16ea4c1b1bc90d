"""From a YAML file and overrides to a Recipe, with every fault at once."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.yaml import dump_yaml, parse_yaml, read_text


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.sub=value`, their values read as YAML.

    Raises:
        RecipeError: holds every fault found, each with its path, what was got, what to do.
    """
    path = Path(path)
    values = parse_yaml(read_text(path), str(path))
    if values is None:
        raise RecipeError(
            str(path), [Fault("", "is empty", "it needs at least model: and data:")]
        )
    if not isinstance(values, dict):
        raise RecipeError(
            str(path),
            [Fault("", f"must be a mapping of sections, got {_kind(values)}")],
        )
    faults = list(_apply_overrides(values, overrides))
    values.setdefault("run_dir", f"runs/{path.stem}")
    _choose_bits(values.get("quantization"))
    return recipe_from_dict(values, str(path), faults)


def recipe_from_dict(
    values: dict[str, Any], source: str, faults: Iterable[Fault] = ()
) -> Recipe:
    """Validate plain values; `faults` are ones already found, reported together with new ones."""
    found = list(faults)
    recipe, section_faults = _validate(values)
    found += section_faults
    if recipe is not None:
        found += recipe.contradictions()
    if found or recipe is None:
        raise RecipeError(source, found)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default spelled out; it loads back as an equal Recipe."""
    path.write_text(dump_yaml(recipe.model_dump(mode="json")), encoding="utf-8")


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 over all that shapes the result: the recipe less the place it runs in."""
    values = recipe.model_dump(mode="json", exclude={"run_dir"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _validate(values: dict[str, Any]) -> tuple[Recipe | None, list[Fault]]:
    """Validate section by section, so that a fault in one hides no contradiction in another."""
    faults: list[Fault] = []
    try:
        recipe = Recipe.model_validate_json(_as_json(values), strict=True)
    except ValidationError as error:
        recipe = None
        faults += _field_faults(error)
    for name, field in Recipe.model_fields.items():
        spec = field.annotation
        if (
            not (isinstance(spec, type) and issubclass(spec, Spec))
            or name not in values
        ):
            continue
        try:
            section = spec.model_validate_json(_as_json(values[name]), strict=True)
        except ValidationError:
            continue  # its faults are in the list above
        faults += [
            Fault(f"{name}.{fault.path}", fault.message, fault.hint)
            for fault in _all_contradictions(section)
        ]
    return recipe, faults


def _field_faults(error: ValidationError) -> list[Fault]:
    """Faults of single fields, less the echo "list is too short" of a faulty item in it."""
    details = error.errors(include_url=False)
    return [
        _fault(one)
        for one in details
        if one["type"] != "too_short"
        or not any(
            other["loc"][: len(one["loc"])] == one["loc"] and other is not one
            for other in details
        )
    ]


def _all_contradictions(spec: Spec, prefix: str = "") -> Iterable[Fault]:
    for fault in spec.contradictions():
        yield Fault(prefix + fault.path, fault.message, fault.hint)
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec):
            yield from _all_contradictions(value, f"{prefix}{name}.")


def _as_json(values: Any) -> str:
    """JSON mode is pydantic's strict mode that still takes a list for a tuple."""
    return json.dumps(values, default=str)


def _choose_bits(quantization: Any) -> None:
    """`load_in_8bit: true` alone means 8 bits *instead of* the default 4."""
    if isinstance(quantization, dict) and quantization.get("load_in_8bit") is True:
        quantization.setdefault("load_in_4bit", False)


def _apply_overrides(
    values: dict[str, Any], overrides: Sequence[str]
) -> Iterable[Fault]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            yield Fault(
                "",
                f"override {override!r} is not key=value",
                "write train.max_steps=10",
            )
            continue
        parts = key.strip().split(".")
        target: Any = values
        for part in parts[:-1]:
            inner = target.get(part)
            target = target.setdefault(part, {}) if inner is None else inner
            if isinstance(target, list):
                target = dict(enumerate(target))
            if not isinstance(target, dict):
                break
        if not isinstance(target, dict):
            yield Fault(
                key,
                f"cannot be overridden: {parts[0]} is {_kind(target)}, not a section",
            )
            continue
        try:
            target[parts[-1]] = parse_yaml(text, key)
        except RecipeError as error:
            yield Fault(key, f"override value {text!r}: {error.faults[0].message}")


def _fault(details: ErrorDetails) -> Fault:
    """One pydantic error in our words: what, got, do."""
    location = [part for part in details["loc"] if not _is_union_branch(part)]
    path = ".".join(str(part) for part in location)
    got = details["input"]
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(location, path)
    if kind == "missing":
        return Fault(path, "is required", _MISSING_HINTS.get(path, ""))
    if kind == "too_short":
        return Fault(
            path, "must have at least one entry, got none", _MISSING_HINTS.get(path, "")
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Fault(path, f"must be a mapping of keys, got {_kind(got)}")
    message = details["msg"].replace("Input should be", "must be")
    message = message.replace("a valid string", "text").replace(
        "a valid boolean", "true or false"
    )
    message = message.replace("a valid tuple", "a list").replace(
        "a valid array", "a list"
    )
    message = message.replace("a valid ", "a ").replace("a integer", "a whole number")
    message = message[0].lower() + message[1:]
    hint = ""
    if kind == "literal_error" and isinstance(got, str):
        expected = str(details.get("ctx", {}).get("expected", "")).replace("'", "")
        near = difflib.get_close_matches(
            got, expected.replace(" or ", ", ").split(", "), n=1
        )
        hint = f"did you mean '{near[0]}'?" if near else ""
    return Fault(path, f"{message}, got {_short(got)}", hint)


_MISSING_HINTS = {
    "model": "model: {name_or_path: demo/smollm2-135m-instruct}",
    "data": "data: {train: [{path: my_rows.jsonl}]}",
    "data.train": "train: [{path: my_rows.jsonl}]",
}


def _unknown_key(location: list[Any], path: str) -> Fault:
    key = str(location[-1])
    known = _fields_at(location[:-1])
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return Fault(path, "unknown key", f"did you mean '{near[0]}'?")
    home = [
        f"{section}.{key}"
        for section, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Spec)
        and key in field.annotation.model_fields
    ]
    if home:
        return Fault(path, "unknown key here", f"it belongs at {home[0]}")
    return Fault(path, "unknown key", f"known here: {', '.join(known)}")


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Field names of the spec that `location` leads to."""
    spec: Any = Recipe
    for part in location:
        if isinstance(part, int) or _is_union_branch(part):
            continue
        spec = _inner_spec(spec.model_fields[part].annotation)
    return list(spec.model_fields)


def _inner_spec(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument
    raise AssertionError(f"no spec in {annotation}")


def _is_union_branch(part: Any) -> bool:
    """pydantic puts the branch of a union into the location; a recipe's author knows no such."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or "[" in part
    )


def _kind(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        type(None): "nothing",
    }
    return names.get(type(value), "a number") + (
        "" if value is None else f" ({_short(value)})"
    )


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    text = "nothing" if value is None else text
    return text if len(text) <= limit else text[: limit - 1] + "…"
