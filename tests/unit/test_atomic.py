"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.atomic import (
    ANOTHER_CACHE,
    draft_beside,
    published_folder,
    replaced_folder,
    require_disk,
)
from qlora_kit.errors import HardwareError

# Writes a folder as process NAME; waits for GO half-way, or dies there if NAME is "killed".
WRITER = """
import os, signal, sys, time
from pathlib import Path
from qlora_kit.atomic import published_folder
folder, name, go = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
with published_folder(folder) as draft:
    (draft / "first").write_text(name)
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder.parent / f"{name}.ready").touch()
    while not go.exists():
        time.sleep(0.01)
    (draft / "second").write_text(name)
"""


def start(folder: Path, name: str, go: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(go)])


def test_two_processes_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    folder, go = tmp_path / "made", tmp_path / "go"
    writers = [start(folder, name, go) for name in ("a", "b")]
    while not all((tmp_path / f"{name}.ready").exists() for name in ("a", "b")):
        assert all(writer.poll() is None for writer in writers)
        time.sleep(0.01)
    assert not folder.exists()
    go.touch()
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert (folder / "first").read_text() == (folder / "second").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ready", "b.ready", "go", "made"]


def test_a_folder_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with (
        pytest.raises(HardwareError, match=r"cannot be written: .*notes\.txt is a file"),
        draft_beside(tmp_path / "notes.txt" / "made"),
    ):
        pass


def test_a_process_killed_half_way_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    writer = start(folder, "killed", tmp_path / "go")
    assert writer.wait(timeout=60) == -signal.SIGKILL
    assert not folder.exists()
    (leftover,) = tmp_path.iterdir()
    with published_folder(folder) as draft:
        assert not leftover.exists()
        (draft / "first").write_text("again")
    assert (folder / "first").read_text() == "again"


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), published_folder(tmp_path / "made") as draft:  # noqa: PT012
        (draft / "first").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_every_file_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    with published_folder(tmp_path / "made") as draft:
        (draft / "private").touch(mode=0o600)
        (draft / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "made").iterdir()}
    assert len(modes) == 1


def test_a_rename_that_fails_for_another_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "made").touch()
    with pytest.raises(OSError), published_folder(tmp_path / "made") as draft:  # noqa: PT011
        (draft / "first").touch()


def test_no_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    require_disk(tmp_path / "not" / "there" / "yet", 999, "a model")
    with pytest.raises(HardwareError, match=r"for a model: 1,000 bytes needed, 999 free.* run_dir"):
        require_disk(tmp_path / "not" / "there" / "yet", 1000, "a model")
    with pytest.raises(HardwareError, match="make room, or set QLORA_KIT_CACHE"):
        require_disk(tmp_path, 1000, "a model", ANOTHER_CACHE)


def test_what_was_there_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "made") as draft:
            (draft / content).touch(mode=0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    (path,) = (tmp_path / "made").iterdir()
    assert path.name == "new"
    assert path.stat().st_mode & 0o777 == (tmp_path / "made").stat().st_mode & 0o666


@pytest.mark.parametrize("fails", ["the block", "the first rename", "the second rename"])
def test_a_replacement_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        is_first = self == folder
        if fails == "the first rename" and is_first:
            raise OSError("refused")
        if fails == "the second rename" and self.suffix == ".draft":
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="refused"), replaced_folder(folder) as draft:  # noqa: PT012
        (draft / "new").touch()
        if fails == "the block":
            raise OSError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in folder.iterdir()] == ["old"]


def test_a_draft_is_gone_where_the_disk_refuses_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, refused = os.unlink, []

    def refusing(path: str, **options: int) -> None:
        if not refused:
            refused.append(path)
            raise OSError(5, "input/output error")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refusing)
    with draft_beside(tmp_path / "made") as draft:
        (draft / "file").touch()
    assert refused
    assert list(tmp_path.iterdir()) == []
