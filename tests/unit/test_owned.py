"""Drafts of killed processes go at once, those of living ones never."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit import owned
from qlora_kit.atomic import draft_beside
from qlora_kit.owned import clear_leftovers, name_of_draft, own

# Is at work in a draft of FOLDER until killed; says which.
OWNER = """
import sys, time
from pathlib import Path
from qlora_kit.atomic import draft_beside
with draft_beside(Path(sys.argv[1])) as draft:
    print(draft, flush=True)
    time.sleep(60)
"""


def make_old(path: Path) -> None:
    long_ago = time.time() - owned.LEFTOVER_SECONDS - 60
    os.utime(path, (long_ago, long_ago))


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "of NFS, where a folder is locked")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_draft_stays_while_its_process_lives_and_goes_once_it_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "made")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        draft = Path(process.stdout.readline().strip())
        make_old(draft)  # a model takes days
        with draft_beside(tmp_path / "made"):
            assert draft.is_dir()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert draft.is_dir()
    with draft_beside(tmp_path / "made"):
        assert not draft.exists()


def test_two_of_one_process_keep_each_other(tmp_path: Path) -> None:
    with draft_beside(tmp_path / "made") as first, draft_beside(tmp_path / "made") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_draft_of_another_machine_is_left_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of BeeGFS and some others, which lock within one machine alone."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "node-3")
        draft = tmp_path / name_of_draft("made")
    draft.mkdir()
    clear_leftovers(tmp_path)
    assert draft.is_dir()
    make_old(draft)
    clear_leftovers(tmp_path)
    assert not draft.exists()


def test_without_locks_a_draft_is_left_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    with draft_beside(tmp_path / "made") as draft, draft_beside(tmp_path / "made"):
        assert draft.is_dir()
        make_old(draft)
        clear_leftovers(tmp_path)
        assert not draft.exists()


def test_a_draft_that_is_taken_for_left_behind_before_it_is_held_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, []

    def removed_before(descriptor: int, operation: int) -> None:
        if not taken:
            (draft,) = tmp_path.iterdir()
            taken.append(draft)
            shutil.rmtree(draft)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with draft_beside(tmp_path / "made") as draft:
        assert taken != [draft]
        assert draft.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_one_that_is_gone_cannot_be_held(tmp_path: Path) -> None:
    assert own(tmp_path / name_of_draft("made")) is None


def test_only_drafts_of_the_names_go(tmp_path: Path) -> None:
    names = ("merged", "merged-original", "checkpoint-4", "odd[1]")
    drafts = {name: tmp_path / name_of_draft(name) for name in names}
    others = [tmp_path / name for name in (".merged.draft", f".merged.{'x' * 32}.draft", "merged")]
    for folder in (*drafts.values(), *others):
        folder.mkdir()
    clear_leftovers(tmp_path, "merged", "odd[1]")
    assert {name for name in names if drafts[name].exists()} == {"merged-original", "checkpoint-4"}
    clear_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)
