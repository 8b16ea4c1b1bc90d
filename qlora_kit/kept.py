"""Small results in the cache, one sealed file each: what one start has found out, so that the next
need not. A cache that cannot be read or written costs the work again and is no reason to stop.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_kit.environment import cache_dir
from qlora_kit.records import DamagedRecordError, read_sealed, sealed_bytes

_FORMAT = 1
_UNUSED_SECONDS = 30 * 24 * 3600


def key_of(facts: Mapping[str, Any]) -> str:
    """Of everything that decides a result; what JSON does not know counts as its text, and sets
    as their members in order.
    """
    text = json.dumps(facts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def recall(kind: str, key: str) -> dict[str, Any] | None:
    """What was kept; None where nothing is, or not what was written."""
    path = _place(kind, key)
    try:
        values = read_sealed(path, _FORMAT)
    except DamagedRecordError:
        return None
    with suppress(OSError):
        os.utime(path)
    values.pop("format")
    return values


def keep(kind: str, key: str, values: Mapping[str, Any]) -> None:
    """For whoever asks for the same; what nobody asked for in a month goes.

    Written beside its place and renamed, so that no other process reads half of it.
    """
    path = _place(kind, key)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            scratch.write_bytes(sealed_bytes({**values, "format": _FORMAT}))
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        for other in path.parent.iterdir():
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                other.unlink(missing_ok=True)
    except OSError:
        return


def _place(kind: str, key: str) -> Path:
    return cache_dir() / kind / f"{key}.json"
