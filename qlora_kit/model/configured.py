"""What a model's config.json says, held against what it said before.

The same weights may be computed with otherwise: with dropout, with positions scaled, with another
window of attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_kit.errors import ModelError
from qlora_kit.model.json_file import read_json

# What it says of its place and its writer, and of the dtype that a recipe decides.
_NOT_COMPUTED_WITH = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_MAX_SETTINGS = 8
_MAX_CHARACTERS = 60


def config_text(folder: Path) -> str:
    """What a model's config.json says of how it computes, as one text that is the same however the
    file is laid out.

    Raises:
        ModelError: it cannot be read.
    """
    content = read_mapping(folder / "config.json")
    said = {name: one for name, one in content.items() if name not in _NOT_COMPUTED_WITH}
    return json.dumps(said, sort_keys=True, ensure_ascii=False)


def read_mapping(path: Path) -> dict[str, Any]:
    """A configuration, unlike any other JSON, which transformers takes and stumbles over later.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} is no configuration: it holds a {type(content).__name__}.")
    return content


def changed_settings(saved: str, now: str) -> str:
    """The entries that differ between two texts of `config_text`, each with both of its values.
    Empty where they are the same, or one of them is no such text.
    """
    try:
        before, after = (dict(_settings(json.loads(text))) for text in (saved, now))
    except ValueError:
        return ""
    changed = [
        f"{name} {_value(before, name)} → {_value(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if _value(before, name) != _value(after, name)
    ]
    more = len(changed) - _MAX_SETTINGS
    return ", ".join(changed[:_MAX_SETTINGS]) + f" and {more} more" * (more > 0)


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of a mapping under its dotted name, mappings within it included."""
    if isinstance(value, dict) and value:
        for name, one in value.items():
            yield from _settings(one, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _value(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return "not set"
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 2]} …"
