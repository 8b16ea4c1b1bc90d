"""Sizes with a unit, such as 20GiB."""

from __future__ import annotations

import re

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")


def is_size(text: str) -> bool:
    """Whether it is a number above 0 with a unit."""
    found = _SIZE.fullmatch(text.strip())
    return found is not None and float(found[1]) > 0


def size_bytes(text: str) -> int:
    """Bytes of what `is_size`."""
    found = _SIZE.fullmatch(text.strip())
    assert found is not None
    return int(float(found[1]) * _UNITS[found[2]])
