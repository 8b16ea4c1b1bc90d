"""A checkpoint while it is written: its files are written, flushed and hashed side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.checkpoint.disk import Disk
from qlora_kit.records import FileRecord, file_record

Buffer = bytes | memoryview


_THREADS = 2
_BUFFERS_A_CALL = 512  # the system takes 1,024


@dataclass(frozen=True)
class _Finished:
    """A file that is on the disk."""

    record: FileRecord
    written_ns: int
    """When it was last written to."""


class Draft:
    """A hidden folder of flat files, and threads that write, flush and hash them."""

    def __init__(self, folder: Path, disk: Disk):
        self.folder = folder
        self._disk = disk
        self._mode = folder.stat().st_mode & 0o666
        self._writer = ThreadPoolExecutor(_THREADS, "write")
        self._flusher = ThreadPoolExecutor(1, "sync")  # one by one, in the order they come
        self._hasher = ThreadPoolExecutor(_THREADS, "sha256")
        self._files: dict[str, Future[_Finished]] = {}

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        # Who waits for another comes first.
        for pool in (self._writer, self._flusher, self._hasher):
            pool.shutdown(cancel_futures=True)

    def put(self, name: str, parts: Sequence[Buffer], sha256: str | None = None) -> None:
        """Have a file written of these bytes, which must stay as they are until the draft is
        finished; whatever hinders is raised by `records`.

        What is hashed is what was meant, not what the disk has made of it. `sha256` is that of
        bytes which were hashed before.
        """
        self._files[name] = self._writer.submit(self._write, name, parts, sha256)

    def _write(self, name: str, parts: Sequence[Buffer], sha256: str | None) -> _Finished:
        path = self.folder / name
        hashed = self._hasher.submit(_sha256_of, parts) if sha256 is None else None
        with path.open("xb", buffering=0) as file:
            _write_all(file.fileno(), parts)
        stat = path.stat()
        if stat.st_size != sum(len(part) for part in parts):
            raise OSError(f"the disk took only part of {name} and said nothing")
        self._disk.sync(path)
        digest = sha256 if hashed is None else hashed.result()
        assert digest is not None
        return _Finished(FileRecord(stat.st_size, digest), stat.st_mtime_ns)

    def add_the_rest(self) -> None:
        """Take the files that something else has written into the folder."""
        for path in sorted(self.folder.iterdir()):
            assert path.is_file(), f"a checkpoint has flat files only, {path.name} is none"
            if path.name not in self._files:
                # Some libraries write files for their owner alone; others follow the umask.
                path.chmod(self._mode)
                self._files[path.name] = self._flusher.submit(self._flush, path)

    def _flush(self, path: Path) -> _Finished:
        written_ns = path.stat().st_mtime_ns
        hashed = self._hasher.submit(file_record, path)
        self._disk.sync(path)
        return _Finished(hashed.result(), written_ns)

    def sha256_of(self, name: str) -> str:
        """Wait for a file that was put.

        Raises:
            OSError: it could not be written.
        """
        return self._files[name].result().record.sha256

    def records(self) -> dict[str, FileRecord]:
        """Wait for all of them.

        Raises:
            OSError: a file could not be written, flushed or read.
        """
        found = {}
        for name, pending in sorted(self._files.items()):
            finished = pending.result()
            found[name] = finished.record
            stat = (self.folder / name).stat()
            now = (stat.st_mtime_ns, stat.st_size)
            is_same = now == (finished.written_ns, finished.record.num_bytes)
            assert is_same, f"{name} was written to after it was finished"
        return found


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
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
