"""Rows of a source, each with where it came from."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qlora_kit.data.demo import demo_rows
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import FILE_ENDINGS as LOCAL_SUFFIXES

DEMO_PREFIX = "demo/"

# What looks like a file is never asked of the hub, even where it cannot be read or is missing.
_UNREAD_SUFFIXES = (".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".md")

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One record and its origin: `number` is the line in a file, else the row, from 1."""

    source: str
    number: int
    record: Record

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.number}"


def read_rows(path: str, split: str, max_rows: int | None = None) -> list[Row]:
    """Every row of a source, in order, or the first `max_rows` of them.

    What stands after those in a file of lines is not looked at, so it may be broken; a file
    that holds one list has to be whole. A text file is one row.

    Raises:
        DataError: the source is missing, unreadable, not what its name says, or empty.
    """
    records: Iterator[tuple[int, Record]]
    if path.startswith(DEMO_PREFIX):
        records = enumerate(demo_rows(path.removeprefix(DEMO_PREFIX), split), start=1)
    elif _is_local(path):
        records = _read_file(_expand(path))
    else:
        records = _read_hub(path, split)
    rows = [Row(path, number, record) for number, record in islice(records, max_rows)]
    if not rows:
        raise DataError(f"{path} holds no rows; there is nothing to read.")
    return rows


def _is_local(path: str) -> bool:
    """Whether this names a file; a hub id is `name` or `owner/name`."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return True
    if path.lower().endswith((*LOCAL_SUFFIXES, *_UNREAD_SUFFIXES)):
        return True
    try:
        return _expand(path).exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{path!r} cannot be looked up: {error}.") from None


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be looked up: {error}") from None


def _read_file(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; name a file ending in {', '.join(LOCAL_SUFFIXES)}."
            )
        if path.exists() and path.suffix.lower() not in LOCAL_SUFFIXES:
            raise DataError(
                f"{path} has the ending {path.suffix or '(none)'}; "
                f"readable are {', '.join(LOCAL_SUFFIXES)}."
            )
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}{_near_miss(path)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}.") from None
    return _records(path, text)


def _near_miss(path: Path) -> str:
    """What may have been meant, as the end of a sentence."""
    try:
        neighbours = [one.name for one in path.parent.iterdir()]
    except OSError:
        return f", nor a folder {path.parent}"
    near = difflib.get_close_matches(path.name, neighbours, n=1)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    return "" if path.is_absolute() else f"; relative paths start in {Path.cwd()}"


def _records(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    if path.suffix.lower() == ".txt":
        if text.strip():
            yield 1, {"text": text}
        return
    if text.lstrip()[:1] == "[":
        for number, record in enumerate(_parse(path, text), start=1):
            yield number, _mapping(path, number, record)
    elif path.suffix.lower() == ".json" and _spans_lines(text):
        yield 1, _mapping(path, 1, _parse(path, text))
    else:
        yield from _json_lines(path, text)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Record]]:
    # str.splitlines would also split at U+2028 and kin, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _mapping(path, number, _parse(path, line, number))


def _spans_lines(text: str) -> bool:
    """Whether the text is one JSON value over several lines, and not one value a line."""
    start = text.lstrip()
    try:
        json.loads(start.partition("\n")[0])
    except (ValueError, RecursionError):
        return bool(start)
    return False


def _parse(path: Path, text: str, first_line: int | None = None) -> Any:
    """Read JSON: one line of a file, or the whole of it."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        where = f"{path}:{(first_line or 1) + error.lineno - 1}"
        what = f"{where} is not JSON: {error.msg} at column {error.colno}."
        if first_line is not None:
            what += " A file of lines holds one JSON object a line."
        elif text.lstrip()[:1] == "[":
            what += " A file that begins with [ is read as one list of objects."
        raise DataError(what) from None
    except RecursionError:
        raise DataError(f"{_where(path, first_line)} is nested too deeply to read.") from None
    except ValueError as error:  # a repeated key, or an integer of thousands of digits
        raise DataError(f"{_where(path, first_line)} cannot be read: {error}.") from None


def _where(path: Path, line: int | None) -> str:
    return str(path) if line is None else f"{path}:{line}"


def _without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {repeated!r} twice")
    return record


def _mapping(path: Path, number: int, record: Any) -> Record:
    if not isinstance(record, dict):
        raise DataError(
            f"{path}:{number} holds {_kind(record)}; each row must be an object, "
            '{"key": value, …}.'
        )
    return record


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else json.dumps(value)


def _read_hub(name: str, split: str) -> Iterator[tuple[int, Record]]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(name, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} is no local file, and the hub did not give its split '{split}': {reason}"
        ) from error
    for number, record in enumerate(rows, start=1):
        yield number, dict(record)
