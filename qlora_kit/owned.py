"""Drafts that belong to a living process, and those whose process was killed.

The owner holds a lock of the kernel (`flock`) on the folder itself, which ends with the process
however that ends. It is believed only of drafts that this machine has made, as on some disks that
several machines share each sees its own locks alone; others, and any on a disk without such locks,
are taken for left behind once they are a day old. Which machine it was is in the draft's name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from pathlib import Path

LEFTOVER_SECONDS = 24 * 3600
_DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})[0-9a-f]{24}\.draft")


def name_of_draft(name: str) -> str:
    """A new one, of a draft of the file or folder `name`."""
    return f".{name}.{_machine()}{uuid.uuid4().hex[8:]}.draft"


def own(draft: Path) -> int | None:
    """A descriptor that holds the draft, which was just made, until it is closed.

    None where another process has taken it for left behind in between, and removed it.
    """
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return descriptor  # no locks on this disk: its age will tell
    if is_still(descriptor, draft):
        return descriptor
    os.close(descriptor)
    return None


def is_still(descriptor: int, path: Path) -> bool:
    """Whether what was opened is still under its name, and not removed by another process."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def clear_leftovers(folder: Path, *names: str) -> None:
    """Remove the drafts in `folder` that nobody owns: of these names, or of any."""
    for path in folder.glob(".*.draft"):
        match = _DRAFT.fullmatch(path.name)
        if match is not None and (not names or match["name"] in names):
            _remove_unless_owned(path, match["machine"] == _machine())


def _remove_unless_owned(draft: Path, is_of_this_machine: bool) -> None:
    """Removed while it is held, so that who has just made it sees that it is gone."""
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except OSError:
        return  # gone meanwhile, or of another user
    try:
        if _is_left_behind(descriptor, is_of_this_machine):
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_left_behind(descriptor: int, is_of_this_machine: bool) -> bool:
    is_old = time.time() - os.fstat(descriptor).st_mtime > LEFTOVER_SECONDS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return is_old
    return is_old or is_of_this_machine


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
