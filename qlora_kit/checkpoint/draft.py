"""A checkpoint while it is written: what is put into it is flushed and hashed meanwhile."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.checkpoint.disk import Disk
from qlora_kit.checkpoint.manifest import FileRecord, record_of

Buffer = bytes | memoryview

_HASHING_THREADS = 2
_BUFFERS_A_CALL = 512  # the system takes 1,024
# What hashing gives the interpreter back for is longer than 2 KiB; below a MiB it is not worth it.
_AT_ONCE_BYTES = 1 << 20


@dataclass(frozen=True)
class _Pending:
    """A file that is finished, but perhaps not yet on the disk."""

    written_ns: int
    flushed: Future[None]
    hashed: Future[FileRecord]


class Draft:
    """A hidden folder of flat files, and threads that flush and hash what is finished."""

    def __init__(self, folder: Path, disk: Disk):
        self.folder = folder
        self._disk = disk
        self._mode = folder.stat().st_mode & 0o666
        self._flusher = ThreadPoolExecutor(1, "sync")  # one by one, in the order they come
        self._hasher = ThreadPoolExecutor(_HASHING_THREADS, "sha256")
        self._pending: dict[str, _Pending] = {}

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)

    def put(self, name: str, parts: Sequence[Buffer], sha256: str | None = None) -> None:
        """Write a file of these bytes, which must stay as they are until the draft is finished.

        What is hashed is what was meant, not what the disk has made of it. `sha256` is that of
        bytes which were hashed before.

        Raises:
            OSError: the disk refused, or took less without a word.
        """
        path = self.folder / name
        num_bytes = sum(len(part) for part in parts)
        with path.open("xb", buffering=0) as file:
            _write_all(file.fileno(), parts)
        if path.stat().st_size != num_bytes:
            raise OSError(f"the disk took only part of {name} and said nothing")
        if sha256 is not None:
            known = FileRecord(num_bytes, sha256)
            self._follow(path, lambda: known)
        else:
            self._follow(path, lambda: FileRecord(num_bytes, _sha256_of(parts)))

    def add(self, path: Path) -> None:
        """Take a finished file that something else has written; one already taken is left alone."""
        assert path.is_file(), f"a checkpoint has flat files only, {path.name} is none"
        if path.name not in self._pending:
            # safetensors writes files that only their owner may read; the others follow the umask.
            path.chmod(self._mode)
            self._follow(path, lambda: record_of(path))

    def add_the_rest(self) -> None:
        for path in sorted(self.folder.iterdir()):
            self.add(path)

    def sha256_of(self, name: str) -> str:
        """Wait for the hash of a file that was put."""
        return self._pending[name].hashed.result().sha256

    def records(self) -> dict[str, FileRecord]:
        """Wait for all of them.

        Raises:
            OSError: a file could not be flushed or read.
        """
        found = {}
        for name, pending in sorted(self._pending.items()):
            pending.flushed.result()
            found[name] = pending.hashed.result()
            stat = (self.folder / name).stat()
            is_same = (stat.st_mtime_ns, stat.st_size) == (
                pending.written_ns,
                found[name].num_bytes,
            )
            assert is_same, f"{name} was written to after it was finished"
        return found

    def _follow(self, path: Path, record: Callable[[], FileRecord]) -> None:
        self._pending[path.name] = _Pending(
            path.stat().st_mtime_ns,
            self._flusher.submit(self._disk.sync, path),
            self._hasher.submit(record),
        )


def _write_all(descriptor: int, parts: Sequence[Buffer]) -> None:
    """All bytes of all parts, however few the system takes at a time."""
    for start in range(0, len(parts), _BUFFERS_A_CALL):
        left = [memoryview(part) for part in parts[start : start + _BUFFERS_A_CALL] if len(part)]
        while left:
            taken = os.writev(descriptor, left)
            while left and taken >= len(left[0]):
                taken -= len(left.pop(0))
            if taken:
                left[0] = left[0][taken:]


def _sha256_of(parts: Sequence[Buffer]) -> str:
    """Small parts are joined: each would cost a hand-over of the interpreter."""
    digest = hashlib.sha256()
    waiting: list[Buffer] = []
    num_waiting = 0
    for part in parts:
        waiting.append(part)
        num_waiting += len(part)
        if num_waiting >= _AT_ONCE_BYTES:
            digest.update(waiting[0] if len(waiting) == 1 else b"".join(waiting))
            waiting, num_waiting = [], 0
    digest.update(b"".join(waiting))
    return digest.hexdigest()
