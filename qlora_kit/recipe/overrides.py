"""`key.sub=value` on the command line: values set in a recipe before it is validated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.shape import child, kind, members
from qlora_kit.recipe.yaml import parse_yaml


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> Iterator[Fault]:
    """Set each override in `values`, the later ones last; yields a fault for each that cannot be.

    A value is read as YAML, so `lora={r: 8}` sets a section and `evaluate.generate=` nothing,
    which means the default of a section and null elsewhere. A number goes into a list:
    `data.train.0.path=rows.jsonl`.
    """
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        parts = _split(key)
        if not equals or not all(parts):
            yield Fault("", f"override {override!r} is not key=value", "write train.max_steps=10")
            continue
        try:
            _assign(values, parts, parse_yaml(text, key), Recipe)
        except _NoSuchPlaceError as error:
            yield Fault(key, f"cannot be overridden: {error}", error.hint)
        except RecipeError as error:
            for fault in error.faults:
                path = f"{key}.{fault.path}" if fault.path else key
                yield Fault(path, f"override value {text!r}: {fault.message}", fault.hint)


class _NoSuchPlaceError(Exception):
    """An override leads nowhere."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def _split(key: str) -> list[str]:
    """The key's parts; below a mapping of module names, whose names have dots, one part."""
    parts = key.split(".")
    annotation: Any = Recipe
    for number, part in enumerate(parts):
        if any(kind(member) is dict for member in members(annotation)):
            return [*parts[:number], ".".join(parts[number:])]
        annotation = child(annotation, part)
    return parts


def _assign(target: Any, parts: list[str], value: Any, annotation: Any, path: str = "") -> None:
    part, rest = parts[0], parts[1:]
    key: str | int = part
    if isinstance(target, list):
        key = _index(target, part, path)
    elif not isinstance(target, dict):
        raise _NoSuchPlaceError(f"{path} is {target!r}, which has no parts")
    if not rest:
        target[key] = value
        return
    inner = child(annotation, part)
    below = target.get(key) if isinstance(target, dict) else target[key]
    if below is None:
        below = [] if any(kind(member) is tuple for member in members(inner)) else {}
    _assign(below, rest, value, inner, f"{path}.{part}" if path else part)
    target[key] = below


def _index(target: list[Any], part: str, path: str) -> int:
    if not part.isdecimal():
        raise _NoSuchPlaceError(f"{path} is a list", f"name one entry of it, as {path}.0")
    if int(part) >= len(target):
        count = len(target)
        there = f"{count} {'entry' if count == 1 else 'entries'}" if count else "no entries"
        raise _NoSuchPlaceError(
            f"{path} has {there}, and counting starts at 0", f"set the whole list: {path}=[…]"
        )
    return int(part)
