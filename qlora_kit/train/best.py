"""Which checkpoint of a run is the best."""

from __future__ import annotations

import math
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.checkpoint.manifest import faults_at_a_glance, step_of
from qlora_kit.errors import RunError
from qlora_kit.train.snapshot import read_progress


def best_checkpoint(run_folder: Path) -> Path | None:
    """The whole one with the lowest eval loss, the earlier of two; None where none was evaluated.

    Each checkpoint holds the loss that was taken after its own update, so it does not matter which
    evaluations were saved, or what has become of a checkpoint since.
    """
    losses = {folder: _eval_loss(folder) for folder in find_checkpoints(run_folder)}
    return min(
        (folder for folder, loss in losses.items() if math.isfinite(loss)),
        key=lambda folder: (losses[folder], step_of(folder)),
        default=None,
    )


def _eval_loss(folder: Path) -> float:
    """NaN where there is none."""
    if faults_at_a_glance(folder):
        return math.nan
    try:
        progress, _ = read_progress(folder)
    except RunError:  # of another version
        return math.nan
    return math.nan if progress.eval_loss is None else progress.eval_loss
