"""The plain file operations."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.checkpoint.disk import Disk

DISK = Disk()


def test_what_is_written_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    DISK.write_bytes(path, b"content")
    DISK.sync(path)
    DISK.sync(tmp_path)
    DISK.rename(path, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"content"
    assert not path.exists()


def test_removing_a_file_a_folder_and_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "inside").touch()
    (tmp_path / "link").symlink_to(target, target_is_directory=True)
    DISK.remove(tmp_path / "link")
    assert (target / "inside").exists()
    (tmp_path / "file").touch()
    DISK.remove(tmp_path / "file")
    DISK.remove(target)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        DISK.remove(target)


def test_free_bytes_are_what_a_user_may_still_write(tmp_path: Path) -> None:
    assert DISK.free_bytes(tmp_path) > 0


@pytest.mark.parametrize("operation", ["sync", "free_bytes"])
def test_what_is_not_there_is_an_error(tmp_path: Path, operation: str) -> None:
    with pytest.raises(FileNotFoundError):
        getattr(DISK, operation)(tmp_path / "none")
