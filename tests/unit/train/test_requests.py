"""Signals and the file that ask for a checkpoint."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from qlora_kit.errors import ProcessLost, RunError
from qlora_kit.train.requests import TRIGGER_FILE, listening, nothing_to_save_yet


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_wait_for_the_end_of_an_update(tmp_path: Path) -> None:
    with listening(tmp_path / TRIGGER_FILE) as requests, requests.deferred():
        assert requests.stop_signal is None
        send(signal.SIGTERM)
        assert requests.stop_signal == signal.SIGTERM
        assert not requests.take_save()


def test_the_second_ends_it_at_once(tmp_path: Path) -> None:
    with listening(tmp_path / TRIGGER_FILE) as requests, requests.deferred():
        send(signal.SIGINT)
        time.sleep(1.05)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_a_launcher_hands_on_as_well_is_the_same_signal(tmp_path: Path, number: int) -> None:
    with listening(tmp_path / TRIGGER_FILE) as requests, requests.deferred():
        for _ in range(3):
            send(number)
        assert requests.stop_signal == number


def test_a_later_sigterm_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    with listening(tmp_path / TRIGGER_FILE) as requests, requests.deferred():
        send(signal.SIGINT)
        time.sleep(1.05)
        send(signal.SIGTERM)
        assert requests.stop_signal == signal.SIGINT


def test_outside_training_nothing_waits(tmp_path: Path) -> None:
    with listening(tmp_path / TRIGGER_FILE), pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM)


def test_a_signal_asks_for_one_checkpoint(tmp_path: Path) -> None:
    with listening(tmp_path / TRIGGER_FILE) as requests, requests.deferred():
        send(signal.SIGUSR1)
        assert requests.take_save()
        assert not requests.take_save()
        assert requests.stop_signal is None


def test_the_file_asks_for_one_and_goes(tmp_path: Path) -> None:
    trigger = tmp_path / TRIGGER_FILE
    with listening(trigger) as requests:
        trigger.touch()
        assert requests.take_save()
        assert not trigger.exists()
        assert not requests.take_save()


def test_a_file_that_cannot_be_removed_asks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that refuses is found out about by the save; any other trouble saves no end."""

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    trigger = tmp_path / TRIGGER_FILE
    trigger.touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    with listening(trigger) as requests, requests.deferred():
        assert requests.take_save()
        assert not requests.take_save()
        send(signal.SIGUSR1)
        assert requests.take_save()


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with listening(tmp_path / TRIGGER_FILE):
        assert signal.getsignal(signal.SIGTERM) != before[1]
    after = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert after == before


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
@pytest.mark.parametrize("ends_process", [False, True])
def test_a_fault_that_ends_the_process_is_told_before_a_sigterm_ends_it(
    tmp_path: Path, ends_process: bool
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trigger = tmp_path / TRIGGER_FILE
    try:
        with pytest.raises(RunError), listening(trigger, ends_process=ends_process):
            raise RunError("at fault")
        after = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert after == (signal.SIG_IGN if ends_process else before)


def test_a_launchers_sigterm_does_not_come_before_that_another_process_is_lost(
    tmp_path: Path,
) -> None:
    def lose() -> None:
        try:
            raise ProcessLost("another has ended")
        finally:
            send(signal.SIGTERM)

    with listening(tmp_path / TRIGGER_FILE) as requests, pytest.raises(ProcessLost):
        lose()
    assert requests.stop_signal is None


def test_a_checkpoint_that_is_asked_for_too_early_is_no_reason_to_end() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with nothing_to_save_yet():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == before
