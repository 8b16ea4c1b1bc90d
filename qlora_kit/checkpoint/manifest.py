"""What makes a folder a checkpoint: the size and SHA-256 of every file, written last.

The manifest vouches for itself too. It holds the SHA-256 of the rest of it, and its bytes must be
exactly those that writing its values again gives, so that no byte of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_FORMAT = 1
_BLOCK_BYTES = 1 << 22  # a thread that hashes waits for the interpreter after each


@dataclass(frozen=True)
class FileRecord:
    """What a file was when the checkpoint was made."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint, and its files by name."""

    step: int
    files: Mapping[str, FileRecord]


class DamagedManifestError(Exception):
    """A manifest that is missing or is not what was written; never leaves this package."""


def step_of(folder: Path) -> int:
    """12 of `checkpoint-12`."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    assert match, f"{folder.name} is no name of a checkpoint"
    return int(match[1])


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one way to write a manifest."""
    values = {
        "files": {
            name: {"bytes": record.num_bytes, "sha256": record.sha256}
            for name, record in manifest.files.items()
        },
        "format": _FORMAT,
        "step": manifest.step,
    }
    return _text({**values, "sha256_of_the_rest": _digest(values)})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, proved to be as it was written.

    Raises:
        DamagedManifestError: says what is wrong with it.
    """
    path = folder / MANIFEST_FILE
    try:
        raw = path.read_bytes()
        values = json.loads(raw)
    except FileNotFoundError:
        raise DamagedManifestError(f"{MANIFEST_FILE} is missing") from None
    except OSError as error:
        raise DamagedManifestError(f"{MANIFEST_FILE} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        empty = "is empty" if not raw else "is damaged: it does not parse"
        raise DamagedManifestError(f"{MANIFEST_FILE} {empty}") from None
    damaged = DamagedManifestError(f"{MANIFEST_FILE} is damaged: it is not what was written")
    if not isinstance(values, dict) or raw != _text(values):
        raise damaged
    digest = values.pop("sha256_of_the_rest", None)
    if digest != _digest(values):
        raise damaged
    if values["format"] > _FORMAT:
        raise DamagedManifestError(
            f"{MANIFEST_FILE} was written by a newer qlora-kit, which this one cannot read"
        )
    files = {
        name: FileRecord(record["bytes"], record["sha256"])
        for name, record in values["files"].items()
    }
    return Manifest(values["step"], files)


def faults_of(folder: Path) -> tuple[str, ...]:
    """What is wrong with a checkpoint, in words that name the file; empty where it is whole.

    Files that the manifest does not name are none of its business, and are never read.
    """
    return _faults(folder, is_trusted=lambda _: False)


def faults_at_a_glance(folder: Path) -> tuple[str, ...]:
    """The same in no time: only files that were touched after the manifest was written are read.

    What rots on the disk by itself is not seen; a resume looks with `faults_of`.
    """
    try:
        written = (folder / MANIFEST_FILE).stat().st_ctime_ns
    except OSError:
        return faults_of(folder)
    return _faults(folder, is_trusted=lambda path: path.stat().st_ctime_ns < written)


def _faults(folder: Path, is_trusted: Callable[[Path], bool]) -> tuple[str, ...]:
    try:
        manifest = read_manifest(folder)
    except DamagedManifestError as error:
        return (str(error),)
    found = []
    if folder.name != f"checkpoint-{manifest.step}":
        found.append(f"{MANIFEST_FILE} is of step {manifest.step}")
    for name, record in manifest.files.items():
        fault = _file_fault(folder / name, record, is_trusted)
        if fault:
            found.append(f"{name} {fault}")
    return tuple(found)


def _file_fault(path: Path, record: FileRecord, is_trusted: Callable[[Path], bool]) -> str:
    try:
        num_bytes = path.stat().st_size
        if not path.is_file():
            return "is no file"
        if num_bytes != record.num_bytes:
            size = "is empty" if num_bytes == 0 else f"has {num_bytes:,} bytes"
            return f"{size}, where {record.num_bytes:,} were written"
        if not is_trusted(path) and record_of(path) != record:
            return "is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def record_of(path: Path) -> FileRecord:
    """Read a file through; raises OSError."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        block = memoryview(bytearray(min(_BLOCK_BYTES, size + 1)))
        while length := file.readinto(block):
            digest.update(block[:length])
            num_bytes += length
    return FileRecord(num_bytes, digest.hexdigest())


def _text(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode("ascii")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(_text(values)).hexdigest()
