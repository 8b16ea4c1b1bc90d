"""Room on the disk for a run that is gone on with: what it holds already, and what is dead."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import find_checkpoints, told_of
from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.checkpoint.run_directory import RunDirectory

_DEAD = re.compile(r"\.[\w.+-]+\.[0-9a-f]{32}\.draft")
_MADE_OF_A_RUN = (".merged", ".quantized", ".exports")


def clear_dead_drafts(run: RunDirectory, disk: Disk = DISK) -> tuple[Path, ...]:
    """Remove what a killed run has left of merges and exports; only for the process that holds
    the run's lock, and of a run that did not end: all of it is made again after training.

    Raises:
        CheckpointError: the disk refused.
    """
    beside = [one for one in run.folder.glob(".*") if one.name.startswith(_MADE_OF_A_RUN)]
    dead = [one for one in (*beside, *run.exports.glob(".*")) if _DEAD.fullmatch(one.name)]
    with told_of("what a killed run left could not be cleared away", run.folder, disk):
        for draft in dead:
            disk.remove(draft)
    return tuple(dead)


def checkpoint_bytes(run: RunDirectory) -> int:
    """Of all checkpoints that stand under their names, which later ones take the places of."""
    return sum(_bytes_in(folder) for folder in find_checkpoints(run.folder))


def merged_bytes(run: RunDirectory) -> int:
    """Of the models that a killed run had merged: they are removed before they are made again."""
    return _bytes_in(run.merged) + _bytes_in(run.quantized)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
