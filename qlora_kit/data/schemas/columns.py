"""Column mapping: where a row keeps what its schema calls otherwise.

Rules:
- A path is a key of the row as it stands, dots and all, or else leads through objects by key
  and through lists by number: `answers.0.text`. Numbers count from 0.
- What a path leads to is taken as it is. The column that it begins in is not read otherwise.
- A path that leads nowhere is a fault of the row; one that leads to null is a null field.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import Unfit, kind, names
from qlora_kit.errors import DataError


def mapped(record: Record, columns: Mapping[str, str]) -> Record:
    """The row with the fields that the mapping fills, and without their columns.

    Raises:
        Unfit: a path leads nowhere.
    """
    filled = {field: _at(record, path, field) for field, path in columns.items()}
    used = {path if path in record else path.partition(".")[0] for path in columns.values()}
    rest = {key: value for key, value in record.items() if key not in used}
    return {**rest, **filled}


def check_targets(
    path: str, columns: Mapping[str, str], known: Collection[str], not_read: str
) -> None:
    """Raise DataError where the mapping fills an unknown field; `not_read` says by whom."""
    for field in columns:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise DataError(
                f"the columns of {path} fill {field!r}, which {not_read}{meant} "
                f"Fields are {', '.join(sorted(known))}."
            )


def _at(record: Record, path: str, field: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    walked = "the row"
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdecimal() and _index(part) < len(value):
            value = value[_index(part)]
        else:
            what = f"has {names(value)}" if isinstance(value, dict) else f"is {_size(value)}"
            detail = f"{field}: {path} finds no {part!r}; {walked} {what}"
            raise Unfit("a column path leads nowhere", detail)
        walked = part if walked == "the row" else f"{walked}.{part}"
    return value


def _index(part: str) -> int:
    return int(part[:18])


def _size(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else kind(value)
