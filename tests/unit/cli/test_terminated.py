"""SIGTERM to a verb: what it has begun is put away, and the exit code says why it ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from qlora_kit.atomic import draft_beside
from qlora_kit.cli import interruptible, train
from qlora_kit.cli.terminated import Terminated


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """Instead of the end of the tests."""

    def fail(*_: object) -> None:
        raise AssertionError("nobody answered the signal")

    before = signal.signal(signal.SIGTERM, fail)
    yield
    assert signal.signal(signal.SIGTERM, before) is fail, "the handler of before was not put back"


def send() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_the_draft_goes_and_the_exit_code_is_143(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @interruptible
    def verb() -> None:
        with draft_beside(tmp_path / "out") as draft:
            (draft / "half.bin").write_bytes(b"x")
            send()

    with pytest.raises(SystemExit) as ended:
        verb()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "terminated\n"
    assert list(tmp_path.iterdir()) == []


def test_an_error_handler_of_the_work_does_not_take_it() -> None:
    @interruptible
    def verb() -> None:
        try:
            send()
        except Exception:  # what a library may do
            raise AssertionError("taken for an error") from None

    with pytest.raises(Terminated):
        verb()


def test_the_same_signal_twice_does_not_end_the_tidying() -> None:
    """As `timeout` sends it, to a process and to its group."""
    tidied = []

    @interruptible
    def verb() -> None:
        try:
            send()
        finally:
            send()
            tidied.append(True)

    with pytest.raises(Terminated):
        verb()
    assert tidied


def test_ctrl_c_is_130_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    @interruptible
    def verb() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        verb()
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_training_keeps_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = signal.getsignal(signal.SIGTERM)
    found = []
    monkeypatch.setattr(train, "command", lambda: found.append(signal.getsignal(signal.SIGTERM)))
    interruptible(train.command)()
    assert found == [heard]


def test_beside_the_main_thread_a_verb_runs_as_well() -> None:
    ran = []
    thread = threading.Thread(target=interruptible(lambda: ran.append(True)))
    thread.start()
    thread.join()
    assert ran == [True]
