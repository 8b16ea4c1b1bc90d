"""The lines of `log.jsonl` up to a checkpoint, which keeps a copy of them."""

from __future__ import annotations

import os
from pathlib import Path

HISTORY_FILE = "history.jsonl"
"""The copy, in a checkpoint."""


def history(log: Path, num_bytes: int) -> bytes:
    """The lines up to there; fewer where the log is shorter."""
    if not log.exists():
        return b""
    with log.open("rb") as file:
        return file.read(num_bytes)


def put_history_back(log: Path, checkpoint: Path, num_bytes: int) -> str | None:
    """Let the log end where it ended at a checkpoint: what is behind it was logged by updates that
    will be made again. Returns what to tell a user, where other than such lines was changed.

    Args:
        num_bytes: how long it was; a version that kept no copy wrote that alone.
    """
    copy = checkpoint / HISTORY_FILE
    if not copy.exists():
        return None if cut_log(log, num_bytes) else _told(log, "are gone from it")
    kept = copy.read_bytes()
    there = log.read_bytes() if log.exists() else b""
    if there.startswith(kept):
        cut_log(log, len(kept))
        return None
    told = _told(log, "were gone from it, and are put back")
    if not kept.startswith(there):
        aside = set_log_aside(log)
        told = _told(log, f"were changed in it; it is kept as {aside.name}, and they are put back")
        there = b""
    with log.open("ab") as file:
        file.write(kept[len(there) :])
    return told


def begin_history(log: Path) -> str | None:
    """Begin without a line. Those of a run whose checkpoints are all damaged are kept, as these
    are: returns what to tell of it.
    """
    if any(log.parent.glob("checkpoint-*.damaged*")) and log.exists() and log.stat().st_size:
        return f"the lines that were in {log.name} are kept as {set_log_aside(log).name}."
    cut_log(log, 0)
    return None


def cut_log(path: Path, num_bytes: int) -> bool:
    """Drop the lines of updates that will be made again; whether those before are all there."""
    size = path.stat().st_size if path.exists() else 0
    if size > num_bytes:
        os.truncate(path, num_bytes)
    return size >= num_bytes


def set_log_aside(log: Path) -> Path:
    """Under a name that is free, which is returned."""
    number, aside = 1, log.with_name(f"{log.name}.aside")
    while aside.exists():
        number += 1
        aside = log.with_name(f"{log.name}.aside-{number}")
    log.rename(aside)
    return aside


def _told(log: Path, what: str) -> str:
    return f"{log.name}: lines of updates before the checkpoint {what}. Training is not affected."
