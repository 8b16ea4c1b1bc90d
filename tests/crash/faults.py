"""What can happen to a process at each of its file operations, brought about from inside.

The interpreter reports every file that is opened, renamed or removed to its audit hooks before it
does so, and a hook may end the process or refuse. Nothing of the program is replaced.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

_OPERATIONS = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "shutil.rmtree",
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSALS = {"full disk": errno.ENOSPC, "I/O error": errno.EIO}
# From then on no file can be longer: of a larger one this much is written, then comes an error.
_LARGEST_BYTES = 8192
FILLER = "filler"
_SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}


@dataclass
class Watch:
    """Counts operations on files under some folders; at number `at` (from 1) `fault` comes."""

    folders: list[str]
    """Of what is written."""
    read_folders: list[str] = field(default_factory=list)
    at: int = 0
    fault: str = "none"
    delay_seconds: float = 0.0
    """So long after the operation. For what is done between two of them."""
    only: str = ""
    """Count operations on files with this in their path alone."""
    told: str = ""
    """A file that the operations are listed in, where there is no fault."""
    count: int = 0
    operations: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS:
            return
        paths = [one for one in arguments if isinstance(one, str | os.PathLike)]
        path = next((p for p in map(os.fspath, paths) if self._is_watched(p)), None)
        if path is None or self.only not in path:
            return
        is_reading = event == "open" and not (arguments[2] or 0) & _WRITING
        if is_reading and not path.startswith(tuple(self.read_folders)):
            return
        self.count += 1
        if self.fault == "none":
            self._note(f"{'read' if is_reading else event} {path}")
        elif self.count == self.at and is_reading and self.fault in _REFUSALS:
            self.at += 1  # a full disk can be read
        elif self.count == self.at:
            self._strike()

    def _is_watched(self, path: str | bytes) -> bool:
        folders = (*self.folders, *self.read_folders)
        return isinstance(path, str) and os.path.abspath(path).startswith(folders)

    def _note(self, operation: str) -> None:
        if self.told:
            descriptor = os.open(self.told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, (json.dumps(operation) + "\n").encode())
            os.close(descriptor)

    def _strike(self) -> None:
        if self.fault == "kill" and self.delay_seconds:
            # Its default action ends the process as SIGKILL does: nothing of ours is run.
            signal.setitimer(signal.ITIMER_REAL, self.delay_seconds)
        elif self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault in _SIGNALS and self.delay_seconds:
            self._send_later(_SIGNALS[self.fault])
        elif self.fault in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self.fault])
        elif self.fault == "SIGINT twice":
            os.kill(os.getpid(), signal.SIGINT)
            self._send_later(signal.SIGINT)
        elif self.fault == "short write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_BYTES, _LARGEST_BYTES))
        elif self.fault == "fill":
            fill(os.path.dirname(self.folders[0]))
        else:
            number = _REFUSALS[self.fault]
            raise OSError(number, os.strerror(number))

    def _send_later(self, number: int) -> None:
        again = threading.Timer(self.delay_seconds, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()


def fill(folder: str) -> None:
    """Take all room that a small disk has left."""
    descriptor = os.open(os.path.join(folder, FILLER), os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while os.write(descriptor, bytes(size)):
                pass
        except OSError:
            continue
    os.close(descriptor)
