"""What the tests of reading share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.read import BadRow, Row, read_source
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SourceSpec

ROWS: list[dict[str, Any]] = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(records: Iterable[object], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def read(path: str | Path, **fields: Any) -> list[Row | BadRow]:
    return list(read_source(SourceSpec(path=str(path), **fields)))


def good(path: str | Path, **fields: Any) -> list[dict[str, Any]]:
    """The records of a source none of whose rows is bad."""
    rows = read(path, **fields)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert not bad
    return [row.record for row in rows if isinstance(row, Row)]


def outcome(path: str | Path, **fields: Any) -> list[tuple[int, Any]]:
    """Each row's number, with its record or the reason for which it is bad."""
    return [
        (row.number, row.record if isinstance(row, Row) else row.reason)
        for row in read(path, **fields)
    ]


def refusal(path: str | Path, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **fields)
    return str(caught.value)


def fault(path: str | Path) -> str | None:
    """What is said of the source, where it is refused; rows come otherwise, and none is lost."""
    try:
        assert read(path)
    except DataError as error:
        return str(error)
    return None
