"""The file operations that decide whether a checkpoint is there.

They are methods so that a test can pass a disk that fails, fills up or kills the process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qlora_kit.atomic import sync


class Disk:
    """The disk as it is. Every method raises OSError."""

    def write_bytes(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def sync(self, path: Path) -> None:
        """Return when a file's content, or a folder's list of names, is on the disk."""
        sync(path)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a folder with all in it."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def free_bytes(self, folder: Path) -> int:
        return shutil.disk_usage(folder).free


DISK = Disk()
