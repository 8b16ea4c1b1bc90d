"""Two processes never train in one folder, and a killed one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_kit.checkpoint.lock import LOCK_FILE, hold
from qlora_kit.errors import RunError

# Holds the lock of FOLDER until killed; says so. With "fork" a child inherits it for a second.
HOLDER = """
import os, sys, time
from pathlib import Path
from qlora_kit.checkpoint.lock import hold
with hold(Path(sys.argv[1]), print):
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(1)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def refuse(message: str) -> None:
    raise AssertionError(message)


def test_a_second_process_is_told_who_and_since_when(tmp_path: Path) -> None:
    with (
        another_process(tmp_path / "run") as other,
        pytest.raises(RunError) as refused,
        hold(tmp_path / "run", refuse, patience_seconds=0.1),
    ):
        raise AssertionError("two at once")
    said = str(refused.value)
    assert said.startswith(f"process {other.pid} has been training in {tmp_path / 'run'} since 20")
    assert said.endswith("UTC. Wait until it ends, or choose another run_dir.")


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    with another_process(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with hold(tmp_path, refuse, patience_seconds=0):
            assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_nor_does_what_it_had_forked(tmp_path: Path) -> None:
    with another_process(tmp_path, "fork") as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with hold(tmp_path, refuse):
            pass


def test_one_process_does_not_hold_it_twice(tmp_path: Path) -> None:
    with (
        hold(tmp_path, refuse),
        pytest.raises(RunError, match=f"process {os.getpid()} has been training"),
        hold(tmp_path, refuse, patience_seconds=0),
    ):
        raise AssertionError("twice")


def test_the_lock_of_a_file_that_is_gone_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder before may end, and unlink the file, between our opening and locking it."""
    flock, calls = fcntl.flock, []

    def unlinked_before(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", unlinked_before)
    with hold(tmp_path, refuse):
        assert len(calls) == 2
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(RunError), hold(tmp_path, refuse, patience_seconds=0):
            raise AssertionError("two at once")


def test_who_waits_takes_over_when_the_first_ends(tmp_path: Path) -> None:
    with another_process(tmp_path) as other:
        killer = threading.Timer(0.3, other.kill)
        killer.start()
        with hold(tmp_path, refuse):
            other.wait()
        killer.join()


def test_nothing_is_left_of_a_folder_in_which_nothing_was_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at fault"), hold(tmp_path / "a" / "run", refuse):
        raise ValueError("the recipe is at fault")
    assert not (tmp_path / "a" / "run").exists()
    with hold(tmp_path / "run", refuse):
        (tmp_path / "run" / "recipe.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"pid": 1}'])
def test_a_holder_that_did_not_sign_is_still_a_holder(tmp_path: Path, content: bytes) -> None:
    with hold(tmp_path, refuse):
        (tmp_path / LOCK_FILE).write_bytes(content)
        with (
            pytest.raises(RunError, match="another process is training in"),
            hold(tmp_path, refuse, patience_seconds=0),
        ):
            raise AssertionError("two at once")


def test_a_holder_on_another_machine_is_named_with_it(tmp_path: Path) -> None:
    with hold(tmp_path, refuse):
        path = tmp_path / LOCK_FILE
        path.write_text('{"pid": 7, "host": "node-3", "since": "2026-01-01 00:00:00 UTC"}')
        with (
            pytest.raises(RunError, match="process 7 on node-3 has been training"),
            hold(tmp_path, refuse, patience_seconds=0),
        ):
            raise AssertionError("two at once")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with hold(tmp_path, said.append):
        pass
    (warning,) = said
    assert "has no locks" in warning


def test_another_error_is_not_taken_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(RunError, match="cannot be written: input/output error"),
        hold(tmp_path, refuse),
    ):
        raise AssertionError("held")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="cannot be written: Not a directory"),
        hold(tmp_path / "file" / "run", refuse),
    ):
        raise AssertionError("held")


def test_waiting_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        hold(tmp_path, refuse),
        pytest.raises(RunError),
        hold(tmp_path, refuse, patience_seconds=0.3),
    ):
        raise AssertionError("twice")
    assert 0.3 <= time.monotonic() - start < 5
