"""From a YAML file and overrides to a Recipe, with every fault at once."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.recipe.base import Spec, all_contradictions
from qlora_kit.recipe.data import DataSpec, SourceSpec
from qlora_kit.recipe.faults import field_faults, show_kind
from qlora_kit.recipe.identity import FIRST_DEFAULTS
from qlora_kit.recipe.model import ModelSpec
from qlora_kit.recipe.overrides import apply_overrides
from qlora_kit.recipe.recipe import Recipe
from qlora_kit.recipe.shape import optional_section_at, section_at
from qlora_kit.recipe.yaml import dump_yaml, parse_yaml
from qlora_kit.refusals import naming

AnySpec = TypeVar("AnySpec", bound=Spec)

_MAX_FILE_BYTES = 256 * 1024

# What stands in for a required section that is at fault, while the others are compared with
# each other. They contradict nothing.
_STAND_INS: dict[str, Spec] = {
    "model": ModelSpec(name_or_path="unknown"),
    "data": DataSpec(
        train=(SourceSpec(path="unknown"),),
        eval=(SourceSpec(path="unknown", split="test"),),
        max_length=2**31,
    ),
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.sub=value`, their values read as YAML.

    A section with nothing under its name (`lora:`) is a section of defaults. A whole number
    must be written as one: 2.0 and 1e3 are refused where 2 and 1000 are meant.

    Raises:
        RecipeError: holds every fault found, each with its path, what was got, what to do.
    """
    values, faults = _read(Path(path), overrides)
    return recipe_from_dict(values, str(path), faults)


def load_written_out(path: Path) -> Recipe:
    """The recipe that a run or a checkpoint was given by `save_recipe`, every default spelled out.
    A field that is not there was not there when it was written, and means what was done before,
    which is its first default (`FIRST_DEFAULTS`).

    Raises:
        RecipeError: as `load_recipe`.
    """
    values, faults = _read(path, ())
    for field, before in FIRST_DEFAULTS.items():
        section, _, name = field.rpartition(".")
        if isinstance(values.get(section), dict):
            values[section].setdefault(name, before)
    return recipe_from_dict(values, str(path), faults)


def load_whole_sections(
    path: str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe, frozenset[str]]:
    """Of a recipe at fault what can be looked at all the same: with something that says nothing in
    place of the sections at fault, and the names of the others.

    Raises:
        RecipeError: it is no recipe at all.
    """
    sections = _valid_sections(_without_empty_sections(_read(Path(path), overrides)[0], Recipe))
    recipe = Recipe.model_validate({**_STAND_INS, **sections})
    return recipe, frozenset(sections)


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Fault]]:
    """The file's values with the overrides, and what is wrong with those."""
    source = str(path)
    values = parse_yaml(_read_text(path), source)
    if values is None:
        raise RecipeError(source, [Fault("", "is empty", "it needs at least model: and data:")])
    if not isinstance(values, dict):
        message = f"must be a mapping of sections, got {show_kind(values)}"
        raise RecipeError(source, [Fault("", message, "it needs at least model: and data:")])
    faults = list(apply_overrides(values, overrides))
    values.setdefault("run_dir", f"runs/{path.stem}")
    return values, faults


def recipe_from_dict(values: dict[str, Any], source: str, faults: Iterable[Fault] = ()) -> Recipe:
    """Validate plain values; `faults` are ones already found, reported together with new ones.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values = _without_empty_sections(values, Recipe)
    found = list(faults)
    recipe: Recipe | None = None
    try:
        recipe = _validate(Recipe, values)
    except ValidationError as error:
        found += field_faults(error)
    found += _contradictions(values)
    if found or recipe is None:
        raise RecipeError(source, list(dict.fromkeys(found)))
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe with every default spelled out; it loads back as an equal Recipe."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            with draft.open("w", encoding="utf-8") as file:
                file.write(recipe_text(recipe))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, with every default spelled out."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _validate(spec: type[AnySpec], values: Any) -> AnySpec:
    """JSON mode is pydantic's strict mode that still takes a list for a tuple.

    Raises:
        ValidationError: of pydantic, with every fault of a field.
    """
    return spec.model_validate_json(json.dumps(values), strict=True)


def _without_empty_sections(values: dict[str, Any], spec: type[Spec]) -> dict[str, Any]:
    """The values less sections that are null, so that those take their defaults."""
    kept = {}
    for name, value in values.items():
        section = section_at(spec, name)
        if section is None:
            kept[name] = value
        elif value is not None:
            is_mapping = isinstance(value, dict)
            kept[name] = _without_empty_sections(value, section) if is_mapping else value
    return kept


def _contradictions(values: dict[str, Any]) -> Iterator[Fault]:
    """Those within each valid section, and those between sections, where a section at fault is
    replaced by one that contradicts nothing; so no fault hides another."""
    sections = _valid_sections(values)
    for name, section in sections.items():
        yield from all_contradictions(section, name)
    yield from Recipe.model_validate({**_STAND_INS, **sections}).contradictions()


def _valid_sections(values: dict[str, Any]) -> dict[str, Spec]:
    sections = {}
    for name, value in values.items():
        section = section_at(Recipe, name) or optional_section_at(Recipe, name)
        if section is not None:
            try:
                sections[name] = _validate(section, value)
            except ValidationError:
                continue  # its faults are among the recipe's
    return sections


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            message = f"is no recipe: {size:,} bytes, where a recipe has a few thousand"
            raise RecipeError(str(path), [Fault("", message)])
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(str(path), [Fault("", "no such file", _near_files(path))]) from None
    except IsADirectoryError:
        fault = Fault("", "is a folder, not a recipe file", _near_files(path / "recipe.yaml"))
        raise RecipeError(str(path), [fault]) from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise RecipeError(str(path), [Fault("", message, "save it as UTF-8")]) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise RecipeError(str(path), [Fault("", message)]) from None


def _near_files(path: Path) -> str:
    """What is there instead, as a hint."""
    there = sorted(other.name for other in path.parent.glob("*.y*ml"))
    near = difflib.get_close_matches(path.name, there, n=1) or difflib.get_close_matches(
        f"{path.name}.yaml", there, n=1
    )
    if near:
        return f"did you mean {path.parent / near[0]}?"
    if there:
        return f"there is {', '.join(str(path.parent / name) for name in there[:5])}"
    return "`qlora-kit recipes` lists the recipes that come with the kit"
