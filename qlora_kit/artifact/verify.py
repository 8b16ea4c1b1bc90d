"""Re-check a folder that the kit has made: its files, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.artifact.lineage import Link, trace
from qlora_kit.artifact.record import (
    ARTIFACT_FILE,
    AdapterRef,
    BaseRef,
    MadeFrom,
    file_names,
    is_artifact,
    read_record,
    verify_artifact,
)
from qlora_kit.checkpoint.manifest import CHECKPOINT_NAME, faults_of
from qlora_kit.checkpoint.manifest import MANIFEST_FILE as CHECKPOINT_MANIFEST
from qlora_kit.checkpoint.manifest import read_manifest as read_checkpoint
from qlora_kit.checkpoint.run_directory import RunDirectory, is_run
from qlora_kit.errors import AdapterError, ArtifactError
from qlora_kit.records import FileRecord, file_fault, file_sha256

ADAPTER_MANIFEST = "qlora_kit.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Verification:
    """Everything that was looked at, each thing once."""

    links: tuple[Link, ...]

    @property
    def holds(self) -> bool:
        return all(link.holds for link in self.links)

    def as_dict(self) -> dict[str, Any]:
        return {
            "holds": self.holds,
            "checked": [
                {
                    "role": link.role,
                    "kind": link.kind,
                    "name": link.name,
                    "num_files": link.num_files,
                    "faults": list(link.faults),
                    "unchecked": link.unchecked or None,
                }
                for link in self.links
            ],
        }


def verify(folder: Path, allow_pickle: bool = False, with_lineage: bool = True) -> Verification:
    """Check a run with all that is in it, or one artifact, adapter or checkpoint.

    Raises:
        ArtifactError: it is none of these.
    """
    _require_known(folder)
    links: dict[Link, None] = {}
    for one in _of_run(folder) if is_run(folder) else [folder]:
        itself, origin = _look_at(one)
        links[itself] = None
        if with_lineage and origin is not None:
            links.update(dict.fromkeys(trace(origin, allow_pickle)))
    if not links:
        raise ArtifactError(
            f"{folder} is a run that has neither checkpoint nor adapter yet: nothing to verify."
        )
    return Verification(_once(links))


def _require_known(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}.")
    marks = (ARTIFACT_FILE, CHECKPOINT_MANIFEST, ADAPTER_MANIFEST)
    if is_run(folder) or CHECKPOINT_NAME.fullmatch(folder.name):
        return
    if not any((folder / mark).is_file() for mark in marks):
        raise ArtifactError(
            f"{folder} has no {ARTIFACT_FILE}, and is neither a run, an adapter of one nor a "
            "checkpoint: nobody recorded what it should be. What merge, quantize and export make "
            "has one."
        )


def _once(links: dict[Link, None]) -> tuple[Link, ...]:
    """Of a folder that is part of a run and another one's parent, only the first mention."""
    looked_at = {link.name for link in links if link.role == "itself"}
    return tuple(
        link
        for link in links
        if link.role == "itself" or link.name not in looked_at or not link.holds
    )


def _of_run(folder: Path) -> Iterator[Path]:
    """What of a run can be checked, in the order it is made."""
    run = RunDirectory(folder)
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    yield from (path for path in inside if CHECKPOINT_NAME.fullmatch(path.name))
    yield from (path for path in (run.last_good, run.adapter) if path.is_dir())
    yield from (path for path in inside if path == run.merged or is_artifact(path))
    if run.exports.is_dir():
        made = sorted(path for path in run.exports.iterdir() if path.is_dir())
        yield from (path for path in made if not path.name.startswith("."))


def _look_at(folder: Path) -> tuple[Link, MadeFrom | None]:
    """The folder's own state, and where it says that it comes from."""
    if is_artifact(folder):
        return _artifact(folder)
    if (folder / CHECKPOINT_MANIFEST).is_file() or CHECKPOINT_NAME.fullmatch(folder.name):
        return _checkpoint(folder)
    if (folder / ADAPTER_MANIFEST).is_file():
        return _adapter(folder)
    fault = f"has no {ARTIFACT_FILE}, so nobody recorded what it should be"
    return Link("itself", "folder", str(folder), (fault,)), None


def _artifact(folder: Path) -> tuple[Link, MadeFrom | None]:
    faults = verify_artifact(folder)
    try:
        record = read_record(folder)
    except ArtifactError:
        return Link("itself", "artifact", str(folder), faults), None
    link = Link("itself", record.kind, str(folder), faults, num_files=len(record.files) + 1)
    return link, record.made_from


def _checkpoint(folder: Path) -> tuple[Link, MadeFrom | None]:
    faults = faults_of(folder)
    num_files = None if faults else len(read_checkpoint(folder).files) + 1
    link = Link("itself", "checkpoint", str(folder), faults, num_files=num_files)
    if faults or not (folder / ADAPTER_MANIFEST).is_file():
        return link, None
    return link, MadeFrom(base=_base_of(folder))


def _adapter(folder: Path) -> tuple[Link, MadeFrom | None]:
    """What adapters are saved with is no sealed record, but names the hash of every file."""
    from qlora_kit.model.manifest import read_manifest

    try:
        manifest = read_manifest(folder)
    except AdapterError as error:
        return Link("itself", "adapter", str(folder), (str(error),)), None
    faults = []
    for name, sha256 in manifest.files.items():
        path = folder / name
        num_bytes = path.stat().st_size if path.is_file() else 0
        fault = file_fault(path, FileRecord(num_bytes, sha256))
        faults += [f"{name} {fault}"] if fault else []
    known = {*manifest.files, ADAPTER_MANIFEST}
    extra = [name for name in file_names(folder) if name not in known]
    faults += [f"{name} is extra: it was not there when the adapter was saved" for name in extra]
    link = Link("itself", "adapter", str(folder), tuple(faults), num_files=len(known))
    weights = folder / _ADAPTER_WEIGHTS
    itself = AdapterRef(str(folder), file_sha256(weights)) if weights.is_file() else None
    return link, MadeFrom(_base_of(folder), itself, manifest.recipe_sha256)


def _base_of(adapter: Path) -> BaseRef:
    from qlora_kit.model.manifest import read_manifest

    manifest = read_manifest(adapter)
    return BaseRef(
        manifest.base_name,
        manifest.base_fingerprint,
        manifest.base_revision,
        manifest.base_gguf_file,
    )
