"""Rows of a source, each with where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_kit.data.demo import demo_rows
from qlora_kit.errors import DataError

DEMO_PREFIX = "demo/"
LOCAL_SUFFIXES = (".json", ".jsonl", ".txt")


@dataclass(frozen=True)
class Row:
    """One record and its origin: `number` is the line in a file, else the row, from 1."""

    source: str
    number: int
    record: dict[str, Any]

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.number}"


def read_rows(path: str, split: str, max_rows: int | None = None) -> list[Row]:
    """Every row of a source, in order.

    Raises:
        DataError: the source is missing, unreadable, not what its name says, or empty.
    """
    if path.startswith(DEMO_PREFIX):
        records = enumerate(demo_rows(path.removeprefix(DEMO_PREFIX), split), start=1)
    elif path.endswith(LOCAL_SUFFIXES) or Path(path).exists():
        records = _read_file(Path(path).expanduser())
    else:
        records = _read_hub(path, split)
    rows = [Row(path, number, record) for number, record in islice(records, max_rows)]
    if not rows:
        raise DataError(f"{path} holds no rows; there is nothing to read.")
    return rows


def _read_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; name a file ending in {', '.join(LOCAL_SUFFIXES)}."
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if path.suffix == ".txt":
        return iter([(1, {"text": text})] if text.strip() else [])
    if path.suffix not in LOCAL_SUFFIXES:
        raise DataError(
            f"{path} has the ending {path.suffix or '(none)'}; "
            f"readable are {', '.join(LOCAL_SUFFIXES)}."
        )
    first = text.lstrip()[:1]
    if first == "[":
        return _json_array(path, text)
    return _json_lines(path, text)


def _json_array(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno} is not JSON: {error.msg}.") from None
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to read as JSON.") from None
    for number, record in enumerate(records, start=1):
        yield number, _mapping(path, number, record)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # str.splitlines would also split at U+2028 and kin, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number} is not JSON: {error.msg} at column {error.colno}. "
                "A .jsonl file holds one JSON object a line."
            ) from None
        except RecursionError:
            raise DataError(
                f"{path}:{number} is nested too deeply to read as JSON."
            ) from None
        yield number, _mapping(path, number, record)


def _mapping(path: Path, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}:{number} holds a JSON {type(record).__name__}; each row must be an object."
        )
    return record


def _read_hub(name: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(name, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = (
            str(error).strip().splitlines()[0]
            if str(error).strip()
            else type(error).__name__
        )
        raise DataError(
            f"{name} is no local file, and the hub did not give its split '{split}': {reason}"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield number, dict(record)
