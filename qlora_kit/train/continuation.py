"""Going on from a checkpoint: whether it fits, and putting it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.checkpoint.global_batch import GlobalBatch
from qlora_kit.errors import RunError
from qlora_kit.model.saved import AdapterFiles
from qlora_kit.processes import Processes
from qlora_kit.train.history import begin_history, put_history_back
from qlora_kit.train.loader import BatchShape
from qlora_kit.train.snapshot import (
    Moving,
    Progress,
    Shared,
    put_random_state_back,
    read_place,
    read_progress,
    read_random_state,
    read_snapshot,
)
from qlora_kit.train.updates import items_per_update

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.trainer import QloraTrainer


@dataclass(frozen=True)
class Continuation:
    """A whole checkpoint that training goes on from."""

    folder: Path
    progress: Progress
    shared: Shared
    allow_drift: bool = False
    place: dict[str, Any] | None = None
    """Where a stream of rows stood."""

    @classmethod
    def read(cls, folder: Path, allow_drift: bool = False) -> Continuation:
        return cls(folder, *read_progress(folder), allow_drift, read_place(folder))

    def items_per_update(self, spec: TrainSpec, num_processes: int) -> int:
        """The global batch that the run began with, unless the recipe now asks for another."""
        shared = self.shared
        begun = GlobalBatch(shared.items_per_update, shared.items_per_process, shared.num_processes)
        return begun.from_here_on(items_per_update(spec, 1), num_processes)


def shape_for(
    spec: TrainSpec, processes: Processes, continuation: Continuation | None
) -> BatchShape:
    """How an update is shared out; of a run that goes on, with the global batch it began with.

    Raises:
        RunError: so many processes cannot share that batch evenly.
    """
    each = spec.per_device_train_batch_size
    accumulation = spec.gradient_accumulation_steps
    if continuation is not None:
        whole = continuation.items_per_update(spec, processes.count)
        if whole % (each * processes.count):
            counts = [n for n in range(1, whole + 1) if whole % (each * n) == 0]
            raise RunError(
                f"{continuation.folder.parent} trains on {whole} sequences per update, which "
                f"{processes.count} processes cannot share {each} at a time. Launch "
                f"{' or '.join(map(str, counts)) or continuation.shared.num_processes}, or change "
                "train.per_device_train_batch_size."
            )
        accumulation = whole // (each * processes.count)
    return BatchShape(each, accumulation, processes.count, processes.rank)


class GoOn(TrainerCallback):
    """Puts a checkpoint back once the model is wrapped and the optimizer there."""

    def __init__(
        self,
        trainer: QloraTrainer,
        continuation: Continuation | None,
        processes: Processes,
        log: Path,
        adapter: AdapterFiles,
    ):
        self.log = log
        self.adapter = adapter
        self.trainer = trainer
        self.continuation = continuation
        self.processes = processes

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.continuation is None:
            self._tell(self.processes.on_main(lambda: begin_history(self.log)))
            return
        trainer, folder = self.trainer, self.continuation.folder
        moving, allow_drift = moving_parts(trainer, self.adapter), self.continuation.allow_drift
        trainer.progress = self.processes.together(
            lambda: read_snapshot(folder, moving, allow_drift)
        )
        state.global_step = trainer.progress.update
        length = trainer.progress.log_bytes
        self._tell(self.processes.on_main(lambda: put_history_back(self.log, folder, length)))
        randoms = self.processes.together(lambda: read_random_state(folder, self.processes.rank))
        if randoms is not None and self.processes.count == self.continuation.shared.num_processes:
            put_random_state_back(randoms)

    def _tell(self, warning: str | None) -> None:
        if warning is not None:
            self.trainer.hooks.warn(warning)


class MakeUp(TrainerCallback):
    """Makes the evaluation that a signal has cut short, once everything stands as it did."""

    def __init__(self, trainer: QloraTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.make_up_evaluation()


def moving_parts(trainer: QloraTrainer, adapter: AdapterFiles) -> Moving:
    """Once the model is wrapped and the optimizer there."""
    return Moving(
        trainer.own_model,
        trainer.optimizer,
        trainer.lr_scheduler,
        trainer.accelerator.scaler,
        adapter,
    )
