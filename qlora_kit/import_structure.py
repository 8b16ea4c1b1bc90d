"""transformers' table of which of its files brings what, kept from one start to the next.

It opens each of its two thousand files to make it, twice whenever it is imported: a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from qlora_kit import kept

Structure = dict[Any, Any]
"""By the name of a folder, its own; by the packages that are needed (a frozenset), the names that
each file brings (a dict of sets)."""

_KIND = "import_structures"  # in the cache
_MODELS = "models"


def remembering(create: Callable[[Any], Structure]) -> Callable[[Any], Structure]:
    """transformers' `create_import_structure_from_path`, which remembers that of all models."""

    @lru_cache
    @wraps(create)
    def structure(module_path: Any) -> Structure:
        """Of a folder, or of the one that a file lies in."""
        given = Path(module_path)
        folder = given.parent if given.is_file() else given
        digest = _digest_of(folder) if folder.name == _MODELS else None
        if digest is None:
            return create(module_path)
        key = kept.key_of({"folder": str(folder), "record": digest})
        known = kept.recall(_KIND, key)
        if known is not None:
            return _read(json.loads(known["entries"]))
        made = create(module_path)
        entries = json.dumps(_written(made))
        if _read(json.loads(entries)) == made:
            kept.keep(_KIND, key, {"entries": entries})
        return made

    return structure


def _digest_of(folder: Path) -> str | None:
    """What the installer has written down of every file of the package; None where it has not, as
    of a package that somebody works on.
    """
    package = folder.parent
    records = list(package.parent.glob(f"{package.name}-*.dist-info/RECORD"))
    if len(records) != 1:
        return None
    try:
        text = records[0].read_bytes()
    except OSError:
        return None
    is_listed = f"{package.name}/{folder.name}/__init__.py,sha256=".encode() in text
    return hashlib.sha256(text).hexdigest() if is_listed else None


def _written(structure: Structure) -> list[Any]:
    return [
        [name, _written(inner)]
        if isinstance(name, str)
        else [sorted(name), {module: sorted(names) for module, names in inner.items()}]
        for name, inner in structure.items()
    ]


def _read(entries: list[Any]) -> Structure:
    return {
        name if isinstance(name, str) else frozenset(name): _read(inner)
        if isinstance(name, str)
        else _sets(inner)
        for name, inner in entries
    }


def _sets(names_of: Mapping[str, list[str]]) -> dict[str, set[str]]:
    return {module: set(names) for module, names in names_of.items()}
