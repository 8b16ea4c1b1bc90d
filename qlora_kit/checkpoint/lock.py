"""One process at a time in a run directory.

The lock is the kernel's (`flock` on `.lock`), so it ends with the process however that ends, and
a file that a killed process left behind holds nobody up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from qlora_kit.errors import RunError
from qlora_kit.owned import is_still

LOCK_FILE = ".lock"
# What a killed process has forked may outlive it for a moment, and holds the lock as long.
PATIENCE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def hold(
    run_folder: Path,
    warn: Callable[[str], None],
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[None]:
    """Be the only process that trains in this folder, which is made where it is missing.

    `warn` is told where the file system has no locks; training goes on then. A folder in which
    nothing was written is gone afterwards.

    Raises:
        RunError: another process is training there, or nothing can be written there.
    """
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(run_folder / LOCK_FILE, warn, time.monotonic() + patience_seconds)
    except OSError as error:
        raise RunError(
            f"run_dir {run_folder} cannot be written: {error.strerror}. Name another folder."
        ) from None
    try:
        _sign(descriptor)
        yield
    finally:
        # Unlinked while it is held: who waits for this file sees that it is no longer the one.
        with contextlib.suppress(OSError):
            (run_folder / LOCK_FILE).unlink()
            run_folder.rmdir()
        os.close(descriptor)


def _acquire(path: Path, warn: Callable[[str], None], until: float) -> int:
    """An open descriptor that holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = is_still(descriptor, path)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(_held_by(descriptor, path.parent)) from None
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            warn(
                f"the file system of {path.parent} has no locks ({error.strerror}): nothing keeps "
                "a second process from training in the same folder."
            )
            is_ours = True
        finally:
            if not is_ours:
                os.close(descriptor)
        if is_ours:
            return descriptor


def _sign(descriptor: int) -> None:
    """Who holds it, for the message that another process shows."""
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _held_by(descriptor: int, run_folder: Path) -> str:
    do = "Wait until it ends, or choose another run_dir."
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        here = holder["host"] == socket.gethostname()
        where = "" if here else f" on {holder['host']}"
        who = f"process {holder['pid']}{where} has been training in {run_folder} since "
        return f"{who}{holder['since']}. {do}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"another process is training in {run_folder}. {do}"
