"""Writing a checkpoint of a training in progress."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint.checkpoints import (
    publish_checkpoint,
    require_room,
    rotate,
)
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.train.continuation import items_per_update, moving_parts
from qlora_kit.train.fitting import fitted
from qlora_kit.train.loader import BatchShape
from qlora_kit.train.sharded import gathered_trainables
from qlora_kit.train.snapshot import Moving, Snapshot, Taken, random_state, snapshot, take

if TYPE_CHECKING:
    import torch

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.callbacks import StepCallback
    from qlora_kit.train.train import Surroundings
    from qlora_kit.train.trainer import QloraTrainer


class Saver:
    """Writes checkpoint-N from what the trainer holds after update N, and clears older ones.

    Training waits while its state is copied; the copy is written beside the next updates.
    """

    def __init__(
        self,
        around: Surroundings,
        shape: BatchShape,
        num_updates: int,
        spec: TrainSpec,
        is_beside: bool = True,
    ):
        self.around = around
        self.shape = shape
        self.num_updates = num_updates
        self.spec = spec
        self.is_beside = is_beside
        """False where a limit on the memory of the process would reach the writing too."""
        self.trainer: QloraTrainer | None = None
        self.step: StepCallback | None = None
        self._moving: Moving | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self) -> None:
        """On every process; the main one writes.

        Raises:
            CheckpointError: this one could not be begun, or the one before not be finished;
                earlier ones are as they were.
        """
        assert self.trainer is not None
        assert self.step is not None
        self.trainer.progress.seconds = self.step.seconds
        self.trainer.progress.fitted = fitted(self.trainer, self.spec)
        randoms = self.around.processes.gathered(random_state())
        if self._moving is None:
            self._moving = moving_parts(self.trainer, self.around.adapter_files)
        moving = self._moving
        taken = take(moving)
        self.around.processes.on_main(lambda: self._begin(taken, moving.num_bytes, randoms))

    def save_last(self) -> None:
        """The update last made, unless there is none, or it is saved already."""
        assert self.trainer is not None
        update = self.trainer.progress.update
        if update and not self.around.processes.on_main(lambda: self._holds(update)):
            self.save()

    def _holds(self, update: int) -> bool:
        self.settle()
        return (self.around.run.folder / f"checkpoint-{update}").exists()

    def settle(self) -> None:
        """Wait until what was saved is whole on the disk, and what is too old is gone.

        Raises:
            CheckpointError: the disk refused; earlier ones are as they were.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def look(self) -> None:
        """The same without waiting."""
        if self._writing is not None and self._writing.done():
            self.settle()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Whatever ends the block, what was saved before is on the disk when it has ended."""
        try:
            yield
        finally:
            if self._writing is not None:
                wait([self._writing])

    def _begin(self, taken: Taken, num_bytes: int, randoms: list[dict[str, Any]]) -> None:
        assert self.trainer is not None
        around, progress = self.around, self.trainer.progress
        self.settle()
        require_room(around.run.folder, num_bytes, around.disk)
        shape = {
            "items_per_update": self.shape.items_per_update,
            "items_per_process": items_per_update(self.spec, 1),
            "num_updates": self.num_updates,
            "num_processes": around.processes.count,
        }
        copied = snapshot(taken, progress, shape, randoms)
        best = self._best(around.run.folder)
        self._writing = self._writer.submit(self._write, progress.update, copied, best)
        if not self.is_beside:
            self.settle()

    def _write(self, update: int, copied: Snapshot, best: Path | None) -> None:
        run, disk = self.around.run, self.around.disk

        def fill(draft: Draft) -> None:
            if run.log.exists():  # a checkpoint says how long the log is
                disk.sync(run.log)
            copied.write(draft)
            for name, text in self.around.records.items():
                draft.put(name, [text.encode()])

        publish_checkpoint(run.folder / f"checkpoint-{update}", fill, disk)
        rotate(run.folder, self.spec.save_total_limit, best, disk)

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
