"""Experiment trackers that go on where the attempt before left off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.environment import tensorboard_folder

if TYPE_CHECKING:
    from transformers.integrations.integration_utils import TensorBoardCallback


def tensorboard(run: Path, update: int) -> TensorBoardCallback:
    """Writes into one folder of the run at every attempt, so that it is one curve; what was
    written after `update`, from which this attempt goes on, is not shown.

    Called by the process that writes.
    """
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    writer = SummaryWriter(
        str(tensorboard_folder(run / "tensorboard")), purge_step=update + 1 if update else None
    )  # type: ignore[no-untyped-call]
    return TensorBoardCallback(writer)
