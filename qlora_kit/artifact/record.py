"""`artifact.json`: what a folder is, what it was made from, and every file's SHA-256.

It is written last and vouches for itself (see records.py). A folder that was made from another
one that has a record names it by path and by that record's own hash, so that the chain can be
walked back to the base.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import qlora_kit
from qlora_kit.errors import ArtifactError
from qlora_kit.records import (
    DamagedRecordError,
    FileRecord,
    file_fault,
    file_record,
    files_as_json,
    files_from_json,
    read_sealed,
    seal_of,
    sealed_bytes,
)
from qlora_kit.versions import package_versions

ARTIFACT_FILE = "artifact.json"
_FORMAT = 1
# A path that leads further up than this, from the artifact's folder, is kept as it is.
_MAX_STEPS_UP = 2


@dataclass(frozen=True)
class BaseRef:
    """The model that stands at the beginning of the chain."""

    name: str
    """A hub id, a built-in model, or an absolute path."""
    fingerprint: str | None
    """`WeightScan.fingerprint`; None where nobody knows it (an adapter without a manifest)."""
    revision: str | None = None
    gguf_file: str | None = None
    """Where `name` holds several GGUF files, the one that was taken."""


@dataclass(frozen=True)
class AdapterRef:
    """The adapter that was trained on the base."""

    path: str
    sha256: str
    """Of its adapter_model.safetensors."""


@dataclass(frozen=True)
class ParentRef:
    """The artifact that this one was made from."""

    kind: str
    path: str
    sha256: str
    """`ArtifactRecord.sha256` of it."""


@dataclass(frozen=True)
class MadeFrom:
    """Where an artifact comes from. What does not apply is None.

    Paths are absolute here. In the file, a path that is near is relative to the artifact's folder,
    so that a run that is moved keeps its lineage.
    """

    base: BaseRef | None = None
    adapter: AdapterRef | None = None
    recipe_sha256: str | None = None
    parent: ParentRef | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that a method looked at."""

    source: str
    num_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class ArtifactRecord:
    """Everything that `artifact.json` says."""

    kind: str
    """`adapter`, `merged`, or the name of a method: `nf4`, `gguf:Q4_K_M`, `onnx` …"""
    made_from: MadeFrom
    settings: Mapping[str, Any]
    """How it was made; JSON values."""
    calibration: CalibrationRecord | None
    versions: Mapping[str, str | None]
    """Of the packages and tools that made it."""
    qlora_kit_version: str
    created: str
    files: Mapping[str, FileRecord]
    """By their path in the folder, with forward slashes."""
    sha256: str = field(default="", compare=False)
    """The record's own hash, over all of the above."""


def made_from(folder: Path, base: BaseRef) -> MadeFrom:
    """Where something comes from that is made out of the model in `folder`.

    Of an artifact, it is the parent, and what it was made from is inherited. Any other folder is
    itself the beginning, which `base` describes.

    Raises:
        ArtifactError: its record is damaged.
    """
    if not (folder / ARTIFACT_FILE).is_file():
        return MadeFrom(base=base)
    record = read_record(folder)
    origin = record.made_from
    return MadeFrom(
        base=origin.base,
        adapter=origin.adapter,
        recipe_sha256=origin.recipe_sha256,
        parent=ParentRef(record.kind, str(folder.resolve()), record.sha256),
    )


def write_record(
    folder: Path,
    *,
    kind: str,
    made_from: MadeFrom,
    settings: Mapping[str, Any] | None = None,
    calibration: CalibrationRecord | None = None,
    tools: Mapping[str, str | None] | None = None,
    home: Path | None = None,
) -> ArtifactRecord:
    """Hash everything in `folder` and write its record, as the last file of all.

    Args:
        tools: versions of what else made it, beside the packages that are always named.
        home: where the folder will be published, where that is not where it is.
    """
    values: dict[str, Any] = {
        "format": _FORMAT,
        "kind": kind,
        "made_from": _stored(made_from, (home or folder).absolute()),
        "settings": dict(settings or {}),
        "calibration": None if calibration is None else asdict(calibration),
        "versions": {**package_versions(), **(tools or {})},
        "qlora_kit_version": qlora_kit.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "files": files_as_json({name: file_record(folder / name) for name in file_names(folder)}),
    }
    path = folder / ARTIFACT_FILE
    with path.open("wb") as file:
        file.write(sealed_bytes(values))
        file.flush()
        os.fsync(file.fileno())
    return _record(values, (home or folder).absolute())


def is_artifact(folder: Path) -> bool:
    return (folder / ARTIFACT_FILE).is_file()


def read_record(folder: Path) -> ArtifactRecord:
    """The record of a folder, proved to be as it was written. Files are not looked at.

    Raises:
        ArtifactError: it is missing, damaged, or of a newer qlora-kit.
    """
    try:
        values = read_sealed(folder / ARTIFACT_FILE, _FORMAT)
    except DamagedRecordError as error:
        raise ArtifactError(f"{folder}: {error}.") from None
    return _record(values, folder.absolute())


def verify_artifact(folder: Path) -> tuple[str, ...]:
    """What of a folder is not as it was written, in words; empty where all is.

    Its files only; see lineage.py for what it was made from.
    """
    try:
        record = read_record(folder)
    except ArtifactError as error:
        return (str(error).removeprefix(f"{folder}: ").removesuffix("."),)
    faults = [f"{name} {file_fault(folder / name, file)}" for name, file in record.files.items()]
    found = [fault for fault in faults if not fault.endswith(" ")]
    extra = [name for name in file_names(folder) if name not in record.files]
    found += [f"{name} is extra: it was not there when the artifact was made" for name in extra]
    return tuple(found)


def file_names(folder: Path) -> list[str]:
    """Every file of an artifact, sorted; hidden ones belong to other programs."""
    relative = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    return sorted(
        path.as_posix()
        for path in relative
        if path.as_posix() != ARTIFACT_FILE and not any(part.startswith(".") for part in path.parts)
    )


def _record(values: Mapping[str, Any], home: Path) -> ArtifactRecord:
    kept = {one.name: values[one.name] for one in fields(ArtifactRecord) if one.name in values}
    calibration = values["calibration"]
    return ArtifactRecord(
        **{
            **kept,
            "made_from": _read(values["made_from"], home),
            "calibration": None if calibration is None else CalibrationRecord(**calibration),
            "files": files_from_json(values["files"]),
            "sha256": seal_of(values),
        }
    )


def _stored(origin: MadeFrom, home: Path) -> dict[str, Any]:
    values = asdict(origin)
    for key in ("adapter", "parent"):
        if values[key] is not None:
            values[key]["path"] = _near(values[key]["path"], home)
    return values


def _near(path: str, home: Path) -> str:
    """Relative to the artifact's folder, with forward slashes, where it is in its surroundings."""
    relative = Path(os.path.relpath(Path(path).resolve(), home.resolve()))
    return relative.as_posix() if relative.parts.count("..") <= _MAX_STEPS_UP else path


def _read(values: Mapping[str, Any], home: Path) -> MadeFrom:
    def placed(one: Mapping[str, Any]) -> dict[str, Any]:
        return {**one, "path": os.path.normpath(home / one["path"])}

    base, adapter, parent = values["base"], values["adapter"], values["parent"]
    return MadeFrom(
        base=None if base is None else BaseRef(**base),
        adapter=None if adapter is None else AdapterRef(**placed(adapter)),
        recipe_sha256=values["recipe_sha256"],
        parent=None if parent is None else ParentRef(**placed(parent)),
    )
