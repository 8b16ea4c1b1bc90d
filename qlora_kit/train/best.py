"""Which checkpoint of a run is the best."""

from __future__ import annotations

import json
import math
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.checkpoint.global_batch import PROGRESS_FILE
from qlora_kit.checkpoint.manifest import faults_at_a_glance, step_of


def best_checkpoint(run_folder: Path) -> Path | None:
    """The whole one with the lowest eval loss, the earlier of two; None where none was evaluated.

    Each checkpoint holds the loss that was taken after its own update, so it does not matter which
    evaluations were saved, or what has become of a checkpoint since.

    Raises:
        OSError: one cannot be read.
    """
    losses = {folder: _eval_loss(folder) for folder in find_checkpoints(run_folder)}
    return min(
        (folder for folder, loss in losses.items() if math.isfinite(loss)),
        key=lambda folder: (losses[folder], step_of(folder)),
        default=None,
    )


def _eval_loss(folder: Path) -> float:
    """NaN where there is none.

    Raises:
        OSError: it cannot be read now, and might be the best.
    """
    if faults_at_a_glance(folder):
        return math.nan
    loss = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8")).get("eval_loss")
    return math.nan if loss is None else float(loss)
