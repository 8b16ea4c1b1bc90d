"""Writing a checkpoint of a training in progress."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from qlora_kit.checkpoint.checkpoints import (
    publish_checkpoint,
    require_room,
    rotate,
    told_of,
)
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.errors import DiskError
from qlora_kit.refusals import refusal_of
from qlora_kit.train.best import best_checkpoint
from qlora_kit.train.continuation import moving_parts
from qlora_kit.train.fitting import fitted
from qlora_kit.train.history import HISTORY_FILE, history
from qlora_kit.train.known_shortcuts import Choice
from qlora_kit.train.loader import BatchShape, Items
from qlora_kit.train.sharded import gathered_trainables
from qlora_kit.train.snapshot import (
    STREAM_FILE,
    Moving,
    Snapshot,
    Taken,
    random_state,
    snapshot,
    take,
)
from qlora_kit.train.updates import items_per_update

if TYPE_CHECKING:
    import torch

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.callbacks import StepCallback
    from qlora_kit.train.surroundings import Surroundings
    from qlora_kit.train.trainer import QloraTrainer


class Saver:
    """Writes checkpoint-N from what the trainer holds after update N, and clears older ones.

    Training waits while its state is copied; the copy is written beside the next updates. Where
    there is none, or memory is limited, it waits until the state is written.
    """

    def __init__(
        self,
        around: Surroundings,
        shape: BatchShape,
        num_updates: int,
        spec: TrainSpec,
        choice: Choice,
        items: Items | None = None,
        is_beside: bool = True,
    ):
        """`items` are those that have a place of their own to keep, if any."""
        self.around = around
        self.shape = shape
        self.num_updates = num_updates
        self.spec = spec
        self.choice = choice
        self.items = items
        self.is_beside = is_beside
        """False where a limit on the memory of the process would reach the copy, too."""
        self.trainer: QloraTrainer | None = None
        self.step: StepCallback | None = None
        self._moving: Moving | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._has_begun = False

    def can_save(self) -> bool:
        """Not under DeepSpeed, whose optimizer's state cannot be put back exactly yet."""
        assert self.trainer is not None
        return self.trainer.args.deepspeed_plugin is None

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
        self.trainer.progress.shortcuts = self.choice.as_dict()
        randoms = self.around.processes.gathered(random_state())
        if self._moving is None:
            self._moving = moving_parts(self.trainer, self.around.adapter_files)
        taken = take(self._moving)
        self.around.processes.on_main(lambda: self._begin(taken, randoms))

    def save_last(self) -> None:
        """The update last made, unless there is none, it is saved already, or none can be."""
        assert self.trainer is not None
        update = self.trainer.progress.update
        if not update or not self.can_save():
            return
        if not self.around.processes.on_main(lambda: self._holds(update)):
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
            wait([self._writing])  # interrupted here, it is still `settled` that waits for it
            writing, self._writing = self._writing, None
            writing.result()

    def has_failed(self) -> bool:
        """Whether `settle` would raise, as far as is known without waiting."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Whatever ends the block, and whoever interrupts, what was saved before is on the disk
        when it has ended, or it is told why not.
        """
        try:
            yield
        finally:
            interrupted = self._wait_for_writer()
            if self._writing is not None and (fault := self._writing.exception()) is not None:
                self.around.reporter.warn(str(fault))  # beside what ends the block
            if interrupted is not None:
                raise interrupted

    def _wait_for_writer(self) -> KeyboardInterrupt | None:
        """The lock of the run is given back after this, so the writer must have ended; returns
        what came meanwhile.
        """
        interrupted: KeyboardInterrupt | None = None
        while self._has_begun:
            try:
                if interrupted is not None:
                    self.around.reporter.warn("a checkpoint is being written; this ends with it.")
                wait([self._writer.submit(_nothing)])  # done when all before it is
            except KeyboardInterrupt as one:
                interrupted = one
            else:
                break
        return interrupted

    def _begin(self, taken: Taken, randoms: list[dict[str, Any]]) -> None:
        assert self.trainer is not None
        around, progress = self.around, self.trainer.progress
        self.settle()
        shape = {
            "items_per_update": self.shape.items_per_update,
            "items_per_process": items_per_update(self.spec, 1),
            "num_updates": self.num_updates,
            "num_processes": around.processes.count,
        }
        with told_of("the log could not be read", around.run.folder, around.disk):
            log = history(around.run.log, progress.log_bytes)
        texts = {**around.records, **self._place_of(progress.update)}
        records = {HISTORY_FILE: log, **{name: text.encode() for name, text in texts.items()}}
        is_beside = self.is_beside and progress.update < self.num_updates
        copied = snapshot(taken, progress, shape, randoms, records, is_copied=is_beside)
        require_room(around.run.folder, copied.num_bytes, around.disk)
        self._has_begun = True
        self._writing = self._writer.submit(self._write, progress.update, copied)
        if not is_beside:
            self.settle()

    def _place_of(self, update: int) -> dict[str, str]:
        """The file that says where the items stand, where their number does not."""
        place = None if self.items is None else self.items.place(update)
        return {} if place is None else {STREAM_FILE: json.dumps(place) + "\n"}

    def _write(self, update: int, copied: Snapshot) -> None:
        run, disk = self.around.run, self.around.disk

        def fill(draft: Draft) -> None:
            if run.log.exists():  # which goes on behind what the checkpoint holds of it
                disk.sync(run.log)
            copied.write(draft)

        publish_checkpoint(run.folder / f"checkpoint-{update}", fill, disk)
        if (limit := self.spec.save_total_limit) is not None:
            rotate(run.folder, limit, self._best(run.folder), disk)

    def _best(self, run: Path) -> Path | None:
        if not self.spec.keep_best:
            return None
        with told_of("the best checkpoint could not be looked for", run, self.around.disk):
            return best_checkpoint(run)

    def _keep(self, folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        try:
            self.around.keep_adapter(folder, **({} if weights is None else {"weights": weights}))
        except (OSError, SafetensorError) as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            raise refusal from error

    def keep_last_good(self, step: int) -> str:
        folder = self.around.run.last_good
        assert self.trainer is not None
        weights = gathered_trainables(self.trainer.own_model)
        try:
            self.around.processes.on_main(lambda: self._keep(folder, weights))
        except DiskError as refused:
            return f"The adapter as it was after step {step} could not be kept: {refused} "
        return f"The adapter as it was after step {step} is kept in {folder}. "


def _nothing() -> None:
    pass
