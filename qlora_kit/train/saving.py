"""Writing a checkpoint of a training in progress."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.checkpoints import (
    publish_checkpoint,
    remove_retired,
    require_room,
    retire,
)
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.train.continuation import items_per_update, moving_parts
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
        self._remover = ThreadPoolExecutor(1, "remove")
        self._removing: Future[None] | None = None

    def save(self) -> None:
        """On every process; the main one writes.

        Raises:
            CheckpointError: it could not be written; earlier ones are as they were.
        """
        assert self.trainer is not None
        assert self.step is not None
        self.trainer.progress.seconds = self.step.seconds
        randoms = self.around.processes.gathered(random_state())
        if self._moving is None:
            self._moving = moving_parts(self.trainer, self.around.adapter_files)
        moving = self._moving
        taken = take(moving)
        self.around.processes.on_main(lambda: self._write(taken, moving.num_bytes, randoms))

    def _write(self, taken: Taken, num_bytes: int, randoms: list[dict[str, Any]]) -> None:
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

        self.settle()
        run = around.run.folder
        require_room(run, num_bytes, around.disk)
        if around.run.log.exists():  # a checkpoint says how long the log is
            around.disk.sync(around.run.log)
        publish_checkpoint(run / f"checkpoint-{progress.update}", fill, around.disk)
        retired = retire(run, self.spec.save_total_limit, self._best(run), around.disk)
        self._remove(run, tuple(retired.values()))

    def _remove(self, run: Path, retired: tuple[Path, ...]) -> None:
        """Beside training: unlinking takes as long as writing."""
        disk = self.around.disk
        self._removing = self._remover.submit(lambda: remove_retired(run, retired, disk))

    def settle(self) -> None:
        """Wait until older checkpoints are gone.

        Raises:
            CheckpointError: the disk refused; the newest is whole.
        """
        if self._removing is not None:
            removing, self._removing = self._removing, None
            removing.result()

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
