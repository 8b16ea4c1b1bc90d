"""Checkpoints as folders: published whole, found, verified, rotated.

A checkpoint is written into a hidden draft beside its place, flushed, given its manifest, and
renamed. Whatever ends the process, and whatever the disk refuses, the earlier ones stay as they
are. All of this is for the one process that holds the lock of the run (`lock.py`).
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.checkpoint.manifest import (
    CHECKPOINT_NAME,
    MANIFEST_FILE,
    Manifest,
    faults_at_a_glance,
    faults_of,
    manifest_bytes,
    step_of,
)
from qlora_kit.errors import CheckpointError
from qlora_kit.model.reason import reason_of

Fill = Callable[[Draft], None]

_LEFTOVER = re.compile(
    r"\.(?P<name>checkpoint-[0-9]+|adapter|last-good)\.[0-9a-f]{32}"
    r"\.(?P<state>draft|replaced|removed)"
)
# Of recipe.yaml, summary.json and the like, by the number of the process that was killed.
_HALF_WRITTEN = re.compile(r"\.[a-z]+\.(json|yaml)\.[0-9]+")
# How torch's C++ writer says that the disk did not take everything; there is no errno in it.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory")


@dataclass(frozen=True)
class Found:
    """The newest checkpoint of a run that is whole, and the newer ones that are not."""

    folder: Path | None
    damaged: tuple[tuple[Path, tuple[str, ...]], ...] = ()
    """Each with its faults, newest first."""

    @property
    def step(self) -> int:
        """0 where there is none."""
        return 0 if self.folder is None else step_of(self.folder)


def publish_checkpoint(folder: Path, fill: Fill, disk: Disk = DISK) -> None:
    """Make the checkpoint `folder` (`checkpoint-N`) of the flat files that `fill` puts into a
    draft; one of the same step that is there already is replaced.

    A file that goes through `Draft.put` is flushed and hashed while the next is written; one that
    is written into the draft's folder by other means, afterwards. Large files go first.

    Raises:
        CheckpointError: the disk refused; what was there before is as it was.
    """
    step = step_of(folder)
    place = _hidden(folder, "draft")
    with told_of(f"{folder.name} could not be written", folder.parent, disk):
        try:
            place.mkdir()
            with Draft(place, disk) as draft:
                fill(draft)
                draft.add_the_rest()
                _seal(place, Manifest(step, draft.records()), disk)
            aside = _put_in_place(place, folder, disk)
            disk.sync(folder.parent)
        finally:
            _try_to_remove(place, disk)
    if aside is not None:
        _try_to_remove(aside, disk)


def _seal(draft: Path, manifest: Manifest, disk: Disk) -> None:
    """Write the manifest that makes a folder of flushed files a checkpoint."""
    path = draft / MANIFEST_FILE
    content = manifest_bytes(manifest)
    disk.write_bytes(path, content)
    disk.sync(path)
    if path.read_bytes() != content:
        raise OSError(f"the disk took only part of {MANIFEST_FILE} and said nothing")
    disk.sync(draft)


def _put_in_place(draft: Path, folder: Path, disk: Disk) -> Path | None:
    """Rename a draft to its name; what had the name is moved aside, and returned.

    Killed in between, both are there under hidden names: `clear_leftovers` puts the old one back.
    """
    if not folder.exists():
        disk.rename(draft, folder)
        return None
    aside = _hidden(folder, "replaced")
    disk.rename(folder, aside)
    try:
        disk.rename(draft, folder)
    finally:
        if not folder.exists():
            disk.rename(aside, folder)
    return aside


def find_checkpoints(run_folder: Path) -> tuple[Path, ...]:
    """The folders named as checkpoints, newest first, whole or not; no drafts."""
    if not run_folder.is_dir():
        return ()
    named = [path for path in run_folder.iterdir() if CHECKPOINT_NAME.fullmatch(path.name)]
    return tuple(sorted((path for path in named if path.is_dir()), key=step_of, reverse=True))


def newest_whole(run_folder: Path) -> Found:
    """Look through the checkpoints, newest first, for one whose every byte is as written."""
    damaged: list[tuple[Path, tuple[str, ...]]] = []
    for folder in find_checkpoints(run_folder):
        faults = faults_of(folder)
        if not faults:
            return Found(folder, tuple(damaged))
        damaged.append((folder, faults))
    return Found(None, tuple(damaged))


def rotate(
    run_folder: Path, keep: int | None, protected: Path | None, disk: Disk = DISK
) -> tuple[Path, ...]:
    """Delete checkpoints beyond the newest `keep`; called when the newest is in place.

    `protected`, the best one, is never deleted. It counts as one of `keep`, as with transformers,
    but the newest is kept in any case: with `keep` 1 there may be two. Damaged ones do not count,
    and go when they are older than all that count. Returns what was deleted.

    Raises:
        CheckpointError: the disk refused; the newest is whole.
    """
    if keep is None:
        return ()
    found = find_checkpoints(run_folder)
    spared = protected.name if protected is not None else None
    whole = [folder for folder in found if not faults_at_a_glance(folder)]
    others = [folder for folder in whole if folder.name != spared]
    places = keep if len(others) == len(whole) else keep - 1
    is_newest_spared = bool(whole) and whole[0].name == spared
    recent = others[: max(places, 0 if is_newest_spared else 1)]
    if len(recent) == len(others):
        return ()
    oldest = step_of(recent[-1]) if recent else step_of(whole[0])
    doomed = [folder for folder in found if step_of(folder) < oldest and folder.name != spared]
    with told_of("old checkpoints could not be deleted", run_folder, disk):
        _delete(doomed, run_folder, disk)
    return tuple(doomed)


def _delete(folders: list[Path], run_folder: Path, disk: Disk) -> None:
    """First out of sight, so that half of a checkpoint never stands under its name."""
    hidden = []
    for folder in reversed(folders):
        hidden.append(_hidden(folder, "removed"))
        disk.rename(folder, hidden[-1])
    disk.sync(run_folder)
    for path in hidden:
        disk.remove(path)


def is_half_written(path: Path) -> bool:
    """Whether a process was killed before it gave this file its name."""
    return bool(_HALF_WRITTEN.fullmatch(path.name))


def clear_leftovers(run_folder: Path, disk: Disk = DISK) -> tuple[Path, ...]:
    """Put right what killed processes left; only for the process that holds the run's lock.

    A folder that was about to be replaced returns to its place; drafts and half-deleted folders
    are removed, and returned.

    Raises:
        CheckpointError: the disk refused.
    """
    if not run_folder.is_dir():
        return ()
    matches = [(path, _LEFTOVER.fullmatch(path.name)) for path in sorted(run_folder.iterdir())]
    removed = []
    with told_of("what a killed process left could not be cleared away", run_folder, disk):
        for path, match in matches:
            if match is None:
                continue
            place = run_folder / match["name"]
            if match["state"] == "replaced" and not place.exists():
                disk.rename(path, place)
                disk.sync(run_folder)
            else:
                disk.remove(path)
                removed.append(path)
        for path in (*run_folder.glob(".*"), *run_folder.glob("data/.*")):
            if is_half_written(path):
                disk.remove(path)
                removed.append(path)
    return tuple(removed)


def require_room(run_folder: Path, needed_bytes: int, disk: Disk = DISK) -> None:
    """Raises CheckpointError where the next checkpoint does not fit on the disk, or that does not
    say how much does.
    """
    with told_of("the next checkpoint could not be begun", run_folder, disk):
        free_bytes = disk.free_bytes(run_folder)
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"no room for the next checkpoint in {run_folder}: {needed_bytes:,} bytes needed, "
            f"{free_bytes:,} free. {what_is_left(run_folder)}"
        )


def what_is_left(run_folder: Path) -> str:
    """Which checkpoint a run can be continued from, and what to do."""
    try:
        newest = newest_whole(run_folder).folder
    except OSError as error:
        return (
            f"{run_folder} cannot be read any more ({error.strerror}): mend the disk, and the same "
            "command goes on from the newest checkpoint that is whole."
        )
    if newest is None:
        return (
            "No whole checkpoint is there yet. Make room or mend the disk, or choose another "
            "run_dir, and start again."
        )
    return (
        f"{newest.name} is whole: make room or mend the disk, and the same command goes on from "
        "there."
    )


@contextlib.contextmanager
def told_of(failure: str, run_folder: Path, disk: Disk) -> Iterator[None]:
    """Raises CheckpointError for what the disk refuses; it says what is still whole."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(one in str(error) for one in _TORCH_WRITER):
            raise  # a fault of ours, not of the disk
        raise CheckpointError(
            f"{failure} in {run_folder}: {_reason(error, run_folder, disk)}. "
            f"{what_is_left(run_folder)}"
        ) from error


def _reason(error: Exception, run_folder: Path, disk: Disk) -> str:
    """What the disk said, and how much room it has now, without the draft."""
    if isinstance(error, OSError):
        said = error.strerror or str(error)
    elif isinstance(error, RuntimeError):
        said = f"the disk did not take everything (torch: {reason_of(error)})"
    else:
        said = reason_of(error)
    with contextlib.suppress(OSError):
        return f"{said} ({disk.free_bytes(run_folder):,} bytes free)"
    return said


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{state}")


def _try_to_remove(path: Path, disk: Disk) -> None:
    """What cannot be removed now, `clear_leftovers` removes at the next start."""
    with contextlib.suppress(OSError):
        if path.exists():
            disk.remove(path)
