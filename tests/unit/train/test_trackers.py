"""tensorboard: one folder for all attempts of a run, and one curve in it."""

from __future__ import annotations

import errno
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_kit.train.trackers import Tensorboard, told_in_the_foreground


def attempt(run: Path, goes_on_from: int, last: int) -> None:
    """Log a loss for each of its updates."""
    callback = Tensorboard(run, goes_on_from, pytest.fail)
    begin(callback)
    for update in range(goes_on_from + 1, last + 1):
        state = SimpleNamespace(is_world_process_zero=True, global_step=update)
        callback.on_log(None, state, None, logs={"loss": 100.0 * goes_on_from + update})
    callback.on_train_end(None, None, None)


def begin(callback: Tensorboard) -> None:
    args: Any = SimpleNamespace(to_json_string=lambda: "{}", output_dir="")
    state: Any = SimpleNamespace(is_world_process_zero=True, is_hyper_param_search=False)
    callback.on_train_begin(args, state, None)


def test_updates_that_were_made_again_are_shown_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    attempt(tmp_path, 0, 4)
    attempt(tmp_path, 2, 6)
    curves = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in curves.Scalars("train/loss")]
    assert points == [(1, 1.0), (2, 2.0), *((step, 200.0 + step) for step in range(3, 7))]


@pytest.mark.filterwarnings("error")
def test_a_disk_that_refuses_ends_the_curves_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    record_writer = import_module("tensorboard.summary.writer.record_writer")

    def refuse(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    warned: list[str] = []
    callback = Tensorboard(tmp_path, 0, warned.append)
    begin(callback)
    monkeypatch.setattr(record_writer.RecordWriter, "write", refuse)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1)
    with told_in_the_foreground():
        for _ in range(100):
            callback.on_log(None, state, None, logs={"loss": 1.0})  # type: ignore[arg-type]
        callback.on_train_end(None, None, None)  # type: ignore[arg-type]
    assert len(warned) == 1
    assert "tensorboard cannot be written (No space left on device); the curves end" in warned[0]
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    (tmp_path / "tensorboard").write_text("in the way")
    warned: list[str] = []
    callback = Tensorboard(tmp_path, 0, warned.append)
    begin(callback)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback.on_log(None, state, None, logs={"loss": 1.0})  # type: ignore[arg-type]
    assert len(warned) == 1
