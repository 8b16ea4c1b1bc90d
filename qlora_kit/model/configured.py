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

# What it says of its place and its writer, of how it is to be used, and of the dtype that a recipe
# decides; at whatever depth, as a model of several parts has it in each.
_NOT_COMPUTED_WITH = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"}
)
_MAX_SETTINGS = 8
_MAX_CHARACTERS = 60
_NOTHING = object()


def config_text(folder: Path) -> str:
    """What a model's config.json says of how it computes, as one text that is the same however the
    file is laid out and its numbers are written.

    Raises:
        ModelError: it cannot be read.
    """
    said = _computed_with(read_mapping(folder / "config.json"))
    return json.dumps(said, sort_keys=True, ensure_ascii=False)


def _computed_with(value: Any) -> Any:
    if isinstance(value, dict):
        told = {name: one for name, one in value.items() if name not in _NOT_COMPUTED_WITH}
        return {name: _computed_with(one) for name, one in told.items()}
    if isinstance(value, list):
        return [_computed_with(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
        f"{name} {_text(before, name)} → {_text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _NOTHING) != after.get(name, _NOTHING)
    ]
    more = len(changed) - _MAX_SETTINGS
    return ", ".join(changed[:_MAX_SETTINGS]) + f" and {more} more" * (more > 0)


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry of mappings and lists under its dotted name."""
    numbered = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(numbered, dict) or not numbered:
        yield path, value
        return
    for name, one in numbered.items():
        yield from _settings(one, f"{path}.{name}" if path else str(name))


def _text(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return "not set"
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 2]} …"
