"""When to evaluate, to save, and to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.train.requests import Requests

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.hooks import Hooks


class Cadence(TrainerCallback):
    """Decides after every update, the same on every process.

    Runs after the callback that logs. The last update is always saved, unless nothing is: what
    follows training can then be gone on with.
    """

    def __init__(
        self,
        spec: TrainSpec,
        updates_per_pass: int,
        num_updates: int,
        requests: Requests,
        hooks: Hooks,
    ):
        self.hooks = hooks
        self.spec = spec
        self.updates_per_pass = updates_per_pass
        self.num_updates = num_updates
        self.requests = requests
        self.stop_signal: int | None = None
        """The signal that ended training before its time."""
        self._last_save = time.monotonic()
        self._is_refusal_told = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Raises CheckpointError, on every process, where the disk has refused what the main one
        was writing beside training.
        """
        update = state.global_step
        is_last = update == self.num_updates
        minutes = self.spec.save_minutes
        is_due = minutes is not None and time.monotonic() - self._last_save >= 60 * minutes
        due, asked, signal, has_failed = _agreed(
            [
                int(is_due),
                int(self.requests.take_save()),
                self.requests.stop_signal or 0,
                int(self.hooks.has_failed()),
            ],
            args,
        )
        if has_failed:
            self.hooks.settle()
        saves = self.spec.save_strategy != "no"
        control.should_evaluate = self._falls_on(
            self.spec.eval_strategy, self.spec.eval_steps, update, is_last
        )
        control.should_save = bool(
            self._falls_on(self.spec.save_strategy, self.spec.save_steps, update, is_last)
            or (saves and is_last)
            or due
            or asked
            or signal
        )
        if control.should_save and not self.hooks.can_save():
            control.should_save = False
            self._tell_refusal()
        if signal:
            self.stop_signal = signal
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._last_save = time.monotonic()

    def _tell_refusal(self) -> None:
        """Once; a recipe that asks for checkpoints is refused before training."""
        if not self._is_refusal_told:
            self._is_refusal_told = True
            self.hooks.warn(
                "no checkpoint is written: DeepSpeed's optimizer cannot be put back exactly yet."
            )

    def _falls_on(self, strategy: str, steps: int | None, update: int, is_last: bool) -> bool:
        if strategy == "steps":
            assert steps is not None
            return update % steps == 0
        return strategy == "epoch" and (update % self.updates_per_pass == 0 or is_last)


def is_saved_beside(spec: TrainSpec, device: str) -> bool:
    """Whether training goes on while a copy of its state is written: not where that copy would be
    in the memory that a limit or a budget is of.
    """
    is_free = spec.memory_budget_bytes is None and spec.max_memory_mib is None
    return device != "cpu" or is_free


def saves_on_its_way(spec: TrainSpec, updates_per_pass: int) -> bool:
    """Whether a checkpoint may be written that is not of the last update.

    Args:
        updates_per_pass: over the rows; 0 where nobody knows.
    """
    if spec.save_minutes is not None or spec.save_strategy == "no":
        return spec.save_minutes is not None
    num_updates: float | None = spec.max_steps
    if num_updates is None and updates_per_pass:
        num_updates = spec.num_train_epochs * updates_per_pass
    if spec.save_strategy == "steps":
        return num_updates is None or spec.save_steps < num_updates
    if spec.max_steps is None:
        return spec.num_train_epochs > 1
    return not updates_per_pass or updates_per_pass < spec.max_steps


def _agreed(flags: list[int], args: TrainingArguments) -> list[int]:
    """The largest of each over all processes, since a clock or a signal may reach one alone."""
    if args.world_size == 1:
        return flags
    shared = torch.tensor(flags, device=args.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return [int(one) for one in shared]
