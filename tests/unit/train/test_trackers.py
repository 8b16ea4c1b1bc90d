"""tensorboard: one folder for all attempts of a run, and one curve in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_kit.train.trackers import tensorboard


def attempt(run: Path, goes_on_from: int, last: int) -> None:
    """Log a loss for each of its updates."""
    callback = tensorboard(run, goes_on_from)
    for update in range(goes_on_from + 1, last + 1):
        state = SimpleNamespace(is_world_process_zero=True, global_step=update)
        callback.on_log(None, state, None, logs={"loss": 100.0 * goes_on_from + update})
    callback.on_train_end(None, None, None)


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
