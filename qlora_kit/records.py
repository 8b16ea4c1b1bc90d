"""Files as they were when they were written, and JSON that vouches for itself.

A sealed record holds the SHA-256 of the rest of it, and its bytes must be exactly those that
writing its values again gives, so that no byte of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 22  # a thread that hashes waits for the interpreter after each
_SEAL = "sha256_of_the_rest"


def json_text(values: Any) -> str:
    """For people and other programs: indented, what is not ASCII as it is, and null for what JSON
    has no number for, NaN and infinity.
    """
    return json.dumps(_with_numbers(values), indent=2, ensure_ascii=False, allow_nan=False)


def _with_numbers(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _with_numbers(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_with_numbers(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written."""

    num_bytes: int
    sha256: str


class DamagedRecordError(Exception):
    """A sealed record that is missing or is not what was written. Whoever reads one turns it into
    a finding or a message of their own; users never see it.
    """


def file_record(path: Path) -> FileRecord:
    """Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(_BLOCK_BYTES, size + 1)))
        while length := file.readinto(block):
            digest.update(block[:length])
            num_bytes += length
    return FileRecord(num_bytes, digest.hexdigest())


def file_sha256(path: Path) -> str:
    return file_record(path).sha256


def file_fault(
    path: Path, record: FileRecord, is_trusted: Callable[[Path], bool] = lambda _: False
) -> str:
    """What a file is that is not as recorded, to be read after its name; empty where it is.

    The contents of a file that `is_trusted` are not read.
    """
    try:
        num_bytes = path.stat().st_size
        if not path.is_file():
            return "is no file"
        if num_bytes != record.num_bytes:
            size = "is empty" if num_bytes == 0 else f"has {num_bytes:,} bytes"
            return f"{size}, where {record.num_bytes:,} were written"
        if not is_trusted(path) and file_record(path) != record:
            return "is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def files_as_json(files: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": record.num_bytes, "sha256": record.sha256} for name, record in files.items()
    }


def files_from_json(values: Mapping[str, Mapping[str, Any]]) -> dict[str, FileRecord]:
    return {name: FileRecord(one["bytes"], one["sha256"]) for name, one in values.items()}


def seal_of(values: Mapping[str, Any]) -> str:
    """The SHA-256 that a record of these values vouches for itself with."""
    return hashlib.sha256(_text(values)).hexdigest()


def sealed_bytes(values: Mapping[str, Any]) -> bytes:
    """The one way to write a record; `values` says its `format`."""
    return _text({**values, _SEAL: seal_of(values)})


def read_sealed(path: Path, newest_format: int) -> dict[str, Any]:
    """The values of a record, proved to be as they were written.

    Raises:
        DamagedRecordError: says what is wrong with it.
    """
    try:
        raw = path.read_bytes()
        values = json.loads(raw)
    except FileNotFoundError:
        raise DamagedRecordError(f"{path.name} is missing") from None
    except OSError as error:
        raise DamagedRecordError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        empty = "is empty" if not raw else "is damaged: it does not parse"
        raise DamagedRecordError(f"{path.name} {empty}") from None
    damaged = DamagedRecordError(f"{path.name} is damaged: it is not what was written")
    if not isinstance(values, dict) or raw != _text(values):
        raise damaged
    if values.pop(_SEAL, None) != seal_of(values):
        raise damaged
    if values["format"] > newest_format:
        raise DamagedRecordError(
            f"{path.name} was written by a newer qlora-kit, which this one cannot read"
        )
    return values


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode("ascii")
