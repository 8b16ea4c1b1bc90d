"""A disk that fails at a chosen operation, and a save that is run on it.

python tests/faulty_disk.py SCENARIO WAY FOLDER

runs the scenario once for every file operation in it, each time in a process of its own that is
killed at that operation, in FOLDER/1, FOLDER/2, …; and prints how many there were.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from qlora_kit.checkpoint.checkpoints import publish_checkpoint, rotate
from qlora_kit.checkpoint.disk import Disk
from qlora_kit.checkpoint.draft import Draft

Fault = Literal[
    "none",
    "kill",  # before the operation
    "kill half-way",  # half of a file is written, half of a folder is removed
    "kill after",
    "full disk",
    "I/O error",
    "short write",  # half of it, and an error
    "silent short write",  # half of it, and no error
]
_ERRNO = {"full disk": errno.ENOSPC, "I/O error": errno.EIO, "short write": errno.ENOSPC}


class FaultyDisk(Disk):
    """Fails once, at operation number `at` (from 1), and counts."""

    def __init__(self, at: int = 0, fault: Fault = "none"):
        self.at = at
        self.fault = fault
        self.operations: list[str] = []
        self._lock = threading.Lock()

    def write_bytes(self, path: Path, content: bytes) -> None:
        def half() -> None:
            path.write_bytes(content[: len(content) // 2])

        self._do(f"write {path.name}", lambda: path.write_bytes(content), half)

    def sync(self, path: Path) -> None:
        self._do(f"sync {path.name}", lambda: super(FaultyDisk, self).sync(path))

    def rename(self, source: Path, target: Path) -> None:
        self._do(f"rename to {target.name}", lambda: source.rename(target))

    def remove(self, path: Path) -> None:
        def half() -> None:
            files = sorted(path.iterdir())
            for file in files[: (len(files) + 1) // 2]:
                file.unlink()

        self._do(f"remove {path.name}", lambda: shutil.rmtree(path), half)

    def _do(
        self, name: str, operation: Callable[[], object], half: Callable[[], None] | None = None
    ) -> None:
        with self._lock:
            self.operations.append(name)
            is_faulty = len(self.operations) == self.at
        if not is_faulty or self.fault == "none":
            operation()
        elif self.fault.startswith("kill"):
            if self.fault == "kill half-way" and half is not None:
                half()
            if self.fault == "kill after":
                operation()
            os.kill(os.getpid(), signal.SIGKILL)
        elif "short" in self.fault and half is not None:
            half()
            if self.fault == "short write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.fault in _ERRNO:
            raise OSError(_ERRNO[self.fault], os.strerror(_ERRNO[self.fault]))
        else:
            operation()  # only a write can be cut short in silence


def content_of(step: int, version: str) -> dict[str, bytes]:
    """The files of a small checkpoint."""
    return {
        name: f"{name} of step {step}, {version}".encode() * 50
        for name in ("adapter.bin", "optimizer.bin", "state.json")
    }


def writer(step: int, version: str) -> Callable[[Draft], None]:
    def write(draft: Draft) -> None:
        for name, content in content_of(step, version).items():
            (draft.folder / name).write_bytes(content)

    return write


def prepare(run_folder: Path) -> None:
    """Two whole checkpoints, 4 and 8."""
    run_folder.mkdir(parents=True)
    for step in (4, 8):
        publish_checkpoint(run_folder / f"checkpoint-{step}", writer(step, "old"))


def next_step(run_folder: Path, disk: Disk) -> None:
    """A third is saved, and the first rotated away."""
    publish_checkpoint(run_folder / "checkpoint-12", writer(12, "new"), disk)
    rotate(run_folder, 2, None, disk)


def same_step(run_folder: Path, disk: Disk) -> None:
    """The second is saved again, and then is the only one."""
    publish_checkpoint(run_folder / "checkpoint-8", writer(8, "new"), disk)
    rotate(run_folder, 1, None, disk)


SCENARIOS = {"next step": next_step, "same step": same_step}


def main(scenario: str, way: Fault, folder: Path) -> None:
    counted = FaultyDisk()
    prepare(folder / "whole")
    SCENARIOS[scenario](folder / "whole", counted)
    for at in range(1, len(counted.operations) + 1):
        prepare(folder / str(at))
        child = os.fork()
        if child == 0:
            SCENARIOS[scenario](folder / str(at), FaultyDisk(at, way))
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"operation {at} did not kill"
        assert os.WTERMSIG(status) == signal.SIGKILL
    print(len(counted.operations))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))  # type: ignore[arg-type]
