"""What makes a folder a checkpoint: the size and SHA-256 of every file, written last.

The manifest vouches for itself too (see records.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.records import (
    DamagedRecordError,
    FileRecord,
    file_fault,
    files_as_json,
    files_from_json,
    read_sealed,
    sealed_bytes,
)

MANIFEST_FILE = "manifest.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The step of a checkpoint, and its files by name."""

    step: int
    files: Mapping[str, FileRecord]


def step_of(folder: Path) -> int:
    """12 of `checkpoint-12`."""
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    assert match, f"{folder.name} is no name of a checkpoint"
    return int(match[1])


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one way to write a manifest."""
    return sealed_bytes(
        {"files": files_as_json(manifest.files), "format": _FORMAT, "step": manifest.step}
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, proved to be as it was written.

    Raises:
        DamagedRecordError: says what is wrong with it.
    """
    values = read_sealed(folder / MANIFEST_FILE, _FORMAT)
    return Manifest(values["step"], files_from_json(values["files"]))


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
    except DamagedRecordError as error:
        return (str(error),)
    found = []
    if folder.name != f"checkpoint-{manifest.step}":
        found.append(f"{MANIFEST_FILE} is of step {manifest.step}")
    for name, record in manifest.files.items():
        fault = file_fault(folder / name, record, is_trusted)
        if fault:
            found.append(f"{name} {fault}")
    return tuple(found)
