"""The shape of a recipe, read off the specs' annotations: what may stand at which key.

Faults and overrides both walk it, so both know the same keys.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qlora_kit.recipe.base import Spec
from qlora_kit.recipe.recipe import Recipe

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    dict: "a mapping of names to values",
}


def members(annotation: Any) -> tuple[Any, ...]:
    """What a field may hold, None left out: one entry unless it is a union."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return tuple(member for part in parts for member in members(part))
    return (annotation,)


def kind(annotation: Any) -> Any:
    """The plain type of a member: `tuple` of `tuple[str, ...]`."""
    return get_origin(annotation) or annotation


def label(annotation: Any) -> str:
    """What pydantic calls a member of a union in the place of a fault, in small letters."""
    return str(getattr(kind(annotation), "__name__", kind(annotation))).rpartition(".")[2].lower()


def is_spec(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)


def section_at(spec: type[Spec], name: str) -> type[Spec] | None:
    """The spec of a section that is always there; None for a plain field, or one that may lack."""
    field = spec.model_fields.get(name)
    annotation: Any = field.annotation if field is not None else None
    return annotation if is_spec(annotation) else None


def optional_section_at(spec: type[Spec], name: str) -> type[Spec] | None:
    """The spec of a section that may lack; None for any other field."""
    field = spec.model_fields.get(name)
    found = () if field is None else members(field.annotation)
    return found[0] if len(found) == 1 and is_spec(found[0]) else None


def child(annotation: Any, key: str | int) -> Any:
    """The annotation of what stands at `key` inside a value of this one; None where unknown."""
    for member in members(annotation):
        if is_spec(member) and key in member.model_fields:
            return member.model_fields[key].annotation
        if kind(member) is tuple and (isinstance(key, int) or key.isdigit()):
            return get_args(member)[0]
        if kind(member) is dict:
            return get_args(member)[1]
    return None


def at(path: Sequence[str | int]) -> Any:
    """The annotation at a path from the top of a recipe; None where unknown."""
    annotation: Any = Recipe
    for part in path:
        annotation = child(annotation, part)
    return annotation


def default_of(path: Sequence[str | int]) -> Any:
    """The default of the field at a path; None where there is none, or no field."""
    for member in members(at(path[:-1])):
        if is_spec(member) and path[-1] in member.model_fields:
            field = member.model_fields[path[-1]]
            return None if field.is_required() else field.default
    return None


def words(annotation: Any) -> str:
    """What a field must be: "text or a list of text"."""
    found = [_member_words(member) for member in members(annotation)]
    if "a number" in found and "a whole number" in found:
        found.remove("a whole number")
    unique = list(dict.fromkeys(found))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} or {unique[-1]}"


def _member_words(member: Any) -> str:
    if is_spec(member):
        return "a mapping of keys"
    if kind(member) is Literal and len(get_args(member)) == 1:
        return str(get_args(member)[0])
    if kind(member) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(member))
    if kind(member) is tuple and members(get_args(member)[0]) == (str,):
        return "a list of text"
    return _WORDS.get(kind(member), "something else")


def paths_of(key: str) -> list[str]:
    """Every dotted path in a recipe that ends in `key`; 0 stands for any place in a list."""
    return [path for path in all_paths() if path.rpartition(".")[2] == key]


def all_paths(spec: type[Spec] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted path of a recipe, sections before what is in them."""
    for name, field in spec.model_fields.items():
        yield prefix + name
        for member in members(field.annotation):
            if is_spec(member):
                yield from all_paths(member, f"{prefix}{name}.")
            elif kind(member) is tuple and is_spec(get_args(member)[0]):
                yield from all_paths(get_args(member)[0], f"{prefix}{name}.0.")
