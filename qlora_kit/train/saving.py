"""Writing a checkpoint of a training in progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.checkpoints import publish_checkpoint, require_room, rotate
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.train.continuation import items_per_update, moving_parts
from qlora_kit.train.fitting import fitted
from qlora_kit.train.loader import BatchShape
from qlora_kit.train.sharded import gathered_trainables
from qlora_kit.train.snapshot import Moving, Taken, random_state, take, write_snapshot

if TYPE_CHECKING:
    import torch

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.callbacks import StepCallback
    from qlora_kit.train.train import Surroundings
    from qlora_kit.train.trainer import QloraTrainer


class Saver:
    """Writes checkpoint-N from what the trainer holds after update N, and clears older ones."""

    def __init__(self, around: Surroundings, shape: BatchShape, num_updates: int, spec: TrainSpec):
        self.around = around
        self.shape = shape
        self.num_updates = num_updates
        self.spec = spec
        self.trainer: QloraTrainer | None = None
        self.step: StepCallback | None = None
        self._moving: Moving | None = None

    def save(self) -> None:
        """On every process; the main one writes.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        assert self.trainer is not None
        assert self.step is not None
        self.trainer.progress.seconds = self.step.seconds
        self.trainer.progress.fitted = fitted(self.trainer, self.spec)
        randoms = self.around.processes.gathered(random_state())
        if self._moving is None:
            self._moving = moving_parts(self.trainer, self.around.adapter_files)
        taken = take(self._moving)
        self.around.processes.on_main(lambda: self._write(taken, randoms))

    def save_last(self) -> None:
        """The update last made, unless there is none, or it is saved already."""
        assert self.trainer is not None
        update = self.trainer.progress.update
        place = self.around.run.folder / f"checkpoint-{update}"
        if update and not self.around.processes.on_main(place.exists):
            self.save()

    def _write(self, taken: Taken, randoms: list[dict[str, Any]]) -> None:
        assert self.trainer is not None
        around, progress = self.around, self.trainer.progress
        shape = {
            "items_per_update": self.shape.items_per_update,
            "items_per_process": items_per_update(self.spec, 1),
            "num_updates": self.num_updates,
            "num_processes": around.processes.count,
        }

        def fill(draft: Draft) -> None:
            write_snapshot(draft, taken, progress, shape, randoms)
            for name, text in around.records.items():
                draft.put(name, [text.encode()])

        run = around.run.folder
        require_room(run, taken.num_bytes, around.disk)
        if around.run.log.exists():  # a checkpoint says how long the log is
            around.disk.sync(around.run.log)
        publish_checkpoint(run / f"checkpoint-{progress.update}", fill, around.disk)
        rotate(run, self.spec.save_total_limit, self._best(run), around.disk)

    def _best(self, run: Path) -> Path | None:
        assert self.trainer is not None
        best = self.trainer.progress.best_update
        return run / f"checkpoint-{best}" if self.spec.keep_best and best is not None else None

    def _keep(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        if weights is None:
            self.around.keep_adapter(folder)
        else:
            self.around.keep_adapter(folder, weights=weights)

    def keep_last_good(self, step: int) -> str:
        folder = self.around.run.last_good
        assert self.trainer is not None
        weights = gathered_trainables(self.trainer.own_model)
        self.around.processes.on_main(lambda: self._keep(folder, weights))
        return f"The adapter as it was after step {step} is kept in {folder}. "
