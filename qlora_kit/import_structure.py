"""transformers' table of which of its files brings what, kept from one start to the next.

It opens each of its two thousand files to make it, twice whenever it is imported: a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from qlora_kit import kept

Structure = dict[Any, Any]
"""By the name of a folder, its own; by the packages that are needed (a frozenset), the names that
each file brings (a dict of sets)."""

_KIND = "import_structures"  # in the cache
_METHOD = 1  # another one whenever a table is written otherwise
_MODELS = "models"
# Of a table that is not as it is known here.
_OTHERWISE = (AttributeError, TypeError, ValueError)


def remembering(create: Callable[[Any], Structure]) -> Callable[[Any], Structure]:
    """transformers' `create_import_structure_from_path`, which remembers that of all models."""

    @lru_cache
    def of_models(folder: Path) -> Structure:
        digest = _digest_of(folder)
        if digest is None:
            return create(folder)
        key = kept.key_of({"method": _METHOD, "folder": str(folder), "digest": digest})
        known = kept.recall(_KIND, key)
        if known is not None:
            return _read(json.loads(known["entries"]))
        made = create(folder)
        with suppress(*_OTHERWISE):
            entries = json.dumps(_written(made))
            if _read(json.loads(entries)) == made:
                kept.keep(_KIND, key, {"entries": entries})
        return made

    @wraps(create)
    def structure(module_path: Any) -> Structure:
        """Of a folder, or of the one that a file lies in."""
        given = Path(module_path)
        folder = given.parent if given.is_file() else given
        return of_models(folder) if folder.name == _MODELS else create(module_path)

    return structure


def _digest_of(folder: Path) -> str | None:
    """Of what the installer has written down of every file of the package, and of the names that
    are there; None where it has not, as of a package that somebody works on.
    """
    package = folder.parent
    records = list(package.parent.glob(f"{package.name}-*.dist-info/RECORD"))
    if len(records) != 1:
        return None
    try:
        text = records[0].read_bytes()
        names = sorted(one.name for one in folder.iterdir())
    except OSError:
        return None
    if f"{package.name}/{folder.name}/__init__.py,sha256=".encode() not in text:
        return None
    return hashlib.sha256(text + "\0".join(names).encode()).hexdigest()


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
