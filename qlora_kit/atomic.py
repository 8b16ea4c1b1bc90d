"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_kit.errors import HardwareError, QloraKitError
from qlora_kit.owned import clear_leftovers, name_of_draft, own
from qlora_kit.refusals import naming

# What to do, other than making room, where a cache does not fit.
ANOTHER_CACHE = "set QLORA_KIT_CACHE to a folder on another disk"


@contextmanager
def draft_beside(folder: Path) -> Iterator[Path]:
    """A hidden scratch folder on the disk of `folder`, gone when the block ends.

    What a killed process leaves is removed by the next use (see `owned`).
    """
    _make(folder.parent, folder)
    clear_leftovers(folder.parent, folder.name)
    draft, descriptor = _make_draft(folder)
    try:
        with naming(folder):
            yield draft
    finally:
        _remove(draft)
        os.close(descriptor)


def _make_draft(folder: Path) -> tuple[Path, int]:
    """A new draft, and the descriptor that says that it has an owner while it is open."""
    while True:
        draft = folder.with_name(name_of_draft(folder.name))
        _make(draft, folder)
        descriptor = own(draft)
        if descriptor is not None:
            return draft, descriptor


def _remove(draft: Path) -> None:
    """Once more where a disk has refused a part of it; what then is left, a later use removes."""
    for _ in range(2):
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)


def _make(folder: Path, meant: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise HardwareError(
            f"{meant} cannot be written: {folder} is a file. Name another folder."
        ) from None
    except OSError as error:
        raise HardwareError(
            f"{meant} cannot be written: {error.strerror} ({folder.parent}). Name another folder."
        ) from None


@contextmanager
def published_folder(folder: Path) -> Iterator[Path]:
    """A draft of flat files that becomes `folder` in one step when the block ends well.

    Of two processes that make the same folder the first wins, and the other's draft is dropped.
    """
    with draft_beside(folder) as draft:
        yield draft
        flush_folder(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """The same, but what is there already is replaced; of two processes the last wins.

    A process killed between the two renames leaves the old folder beside, as `.NAME.*.replaced`.
    """
    with draft_beside(folder) as draft:
        yield draft
        flush_folder(draft)
        aside = draft.with_suffix(".replaced")
        try:
            if folder.exists():
                folder.rename(aside)
            draft.rename(folder)
            sync(folder.parent)
        finally:
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            shutil.rmtree(aside, ignore_errors=True)


def flush_folder(draft: Path) -> None:
    """Bring flat files and their names to the disk."""
    for path in draft.iterdir():
        # safetensors writes files that only their owner may read; the others follow the umask.
        path.chmod(draft.stat().st_mode & 0o666)
        sync(path)
    sync(draft)


def publish_lines(path: Path, lines: Iterable[str], overwrite: bool = False) -> None:
    """Write a text file beside `path` and rename it, so that it is there whole or not at all.

    Raises:
        QloraKitError: it is there already, or cannot be written.
    """
    refuse_existing(path, overwrite)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        refuse_existing(path, overwrite)
        draft.replace(path)
    except OSError as error:
        raise QloraKitError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        draft.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises QloraKitError where a file would be lost."""
    if path.is_dir():
        raise QloraKitError(f"{path} is a folder; name a file.")
    if path.exists() and not overwrite:
        raise QloraKitError(f"{path} is there already; --force overwrites it.")


def require_disk(
    folder: Path, needed_bytes: int, what: str, instead: str = "choose another run_dir"
) -> None:
    """Make sure that `needed_bytes` fit into `folder`, which need not exist yet.

    Raises:
        HardwareError: they do not fit; `instead` says what to do other than making room.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise HardwareError(
            f"no room on the disk for {what}: {needed_bytes:,} bytes needed, {free_bytes:,} free "
            f"in {place}; make room, or {instead}."
        )


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
