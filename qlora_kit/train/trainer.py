"""The Hugging Face Trainer, told what to train on and when to save, and watched at every step."""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from qlora_kit.data.collate import NOT_FOR_THE_MODEL, Batch
from qlora_kit.errors import HardwareError, TrainingError
from qlora_kit.model.adapter import require_float32_trainables
from qlora_kit.out_of_memory import (
    RanOut,
    first_of,
    free_memory,
    is_out_of_memory,
    ran_out,
)
from qlora_kit.train.exchange import average_gradients
from qlora_kit.train.held_out import GivenUp
from qlora_kit.train.loader import AnyCollator, MicroBatches, data_loader, divided
from qlora_kit.train.snapshot import Progress, put_random_state_back, random_state

if TYPE_CHECKING:
    from qlora_kit.train.held_out import HeldOutLoss
    from qlora_kit.train.hooks import Hooks
    from qlora_kit.train.recompute import Recompute


class QloraTrainer(Trainer):
    """Adds to the Trainer: batches that we order, exact counts, a check of every loss and
    gradient, smaller micro-batches where memory runs out, LoRA+, checkpoints of our own.

    Batches carry `items`, the sequences they were made of, `origins`, the rows of those, and
    `num_tokens`.
    """

    def __init__(
        self,
        *args: Any,
        batches: MicroBatches,
        collator: AnyCollator,
        held_out: HeldOutLoss | None,
        hooks: Hooks,
        progress: Progress,
        recompute: Recompute | None = None,
        divisor: int = 1,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.batches = batches
        self.collator = collator
        self.held_out = held_out
        self.hooks = hooks
        self.progress = progress
        self.recompute = recompute
        self.divisor = divisor
        """Parts that a micro-batch is divided into, so that it fits the memory."""
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._window: list[Batch] = []
        """Micro-batches of the update under way."""
        self._window_random: dict[str, Any] = {}
        self._window_loss = 0.0
        self._ran_out: RanOut | None = None
        """In the update under way, on this process."""
        self._faulty: tuple[str, ...] = ()
        """Rows whose loss was not finite; several processes stop together, after the update."""
        self._trainables_checked = False
        self._num_parameters: int | None = None
        """Without embeddings, once they have been counted."""
        self.stop_signal: int | None = None
        """Of the signal for which an evaluation was given up."""

    def get_train_dataloader(self) -> Any:
        return data_loader(self.batches, self.args.dataloader_pin_memory)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self._trainables_checked:
            require_float32_trainables(model)
            self._trainables_checked = True
        if not self._window:
            self._window_random = random_state()
        self._window.append(inputs)
        self._attempt(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._complete_update(model, num_items_in_batch)
        return torch.zeros((), device=self.args.device)  # losses are booked in _window_loss

    def floating_point_ops(self, inputs: Batch) -> int:
        """As the model has it, 6 for each token and parameter; the parameters are counted once, and
        not again in every update, as transformers does.
        """
        if self._num_parameters is None:
            model: Any = self.model
            self._num_parameters = int(model.num_parameters(exclude_embeddings=True))
        return 6 * int(inputs["input_ids"].numel()) * self._num_parameters

    def _attempt(self, model: nn.Module, inputs: Batch, num_items: Any) -> None:
        """Forward and backward, unless memory has run out in this update, which is then begun
        again by all processes where they meet.

        Raises:
            HardwareError: it runs out, and the others already wait for this process.
        """
        if self._ran_out is not None:
            return
        try:
            with _apart(model):
                self._window_loss += float(self._divided_step(model, inputs, num_items))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._ran_out = ran_out(error, inputs["input_ids"].shape[-1])
        # The error is gone by here, and with it the tensors that its frames held.
        if self._ran_out is not None and self.waits_inside:
            raise HardwareError(self.hooks.out_of_memory(self._ran_out, self.micro_batch))

    def _complete_update(self, model: nn.Module, num_items: Any) -> None:
        """See that every process has its gradients, with smaller micro-batches where memory ran
        out, and average them.

        A backward pass that fails half-way leaves half a gradient, so the update is begun again.

        Raises:
            HardwareError: one sequence at a time is too much; there is a checkpoint.
        """
        while (found := first_of(self.hooks.gathered(self._ran_out))) is not None:
            model.zero_grad()
            put_random_state_back(self._window_random)
            self._ran_out, self._window_loss, self._faulty = None, 0.0, ()
            if self.micro_batch == 1 and not self.can_recompute:
                self.hooks.save_last()
            self.divide_further(found)
            for inputs in self._window:
                self._attempt(model, inputs, num_items)
        if isinstance(model, DistributedDataParallel):
            average_gradients(model.module, self.args.world_size, self.hooks.gathered)

    def _divided_step(self, model: nn.Module, inputs: Batch, num_items: Any) -> torch.Tensor:
        if not inputs["items"] and self.args.world_size == 1:
            return torch.zeros((), device=self.args.device)
        total = torch.zeros((), device=self.args.device)
        for part in divided(inputs, self.divisor, self.collator):
            with self.hooks.limit.enforced():
                loss = super().training_step(model, for_the_model(part), num_items)
            if not torch.isfinite(loss):
                self._faulty = self._faulty or tuple(part["origins"])
                if self.args.world_size == 1:
                    self.stop("loss", float(loss), part["origins"])
            total += loss
        return total

    @property
    def own_model(self) -> nn.Module:
        """The model itself, without what joins processes."""
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(model, nn.Module)
        return model

    @property
    def micro_batch(self) -> int:
        """Sequences at a time."""
        return -(-self.args.per_device_train_batch_size // self.divisor)

    @property
    def can_recompute(self) -> bool:
        """Whether memory can be had by more recomputing, on any process; where it cannot be told
        for the others, all choose alike.
        """
        may = self.recompute is not None and self.recompute.can_give_more()
        return any(self.hooks.gathered(may))

    @property
    def waits_inside(self) -> bool:
        """Whether a process waits for the others within forward and backward, as with a sharded
        model: one that runs out of memory there cannot agree on anything with them.
        """
        return self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )

    def forward_and_backward(self, batch: Batch) -> None:
        """On this process alone; the gradient is for nobody."""
        model = self.own_model
        for part in divided(batch, self.divisor, self.collator):
            with self.hooks.limit.enforced():
                super().training_step(model, for_the_model(part), torch.ones(()))

    def divide_further(self, found: RanOut, where: str = "") -> None:
        """Let all layers recompute; where they do, halve the micro-batch. Called by all processes.

        Args:
            where: in what memory ran out; unset: in the update under way.

        Raises:
            HardwareError: it is down to one sequence.
        """
        free_memory(self.args.device.type)
        where = where or f"at update {self.progress.update + 1}"
        if self.can_recompute:
            assert self.recompute is not None
            self.recompute.all()
            self.hooks.warn(
                f"out of memory {where} ({found.reason}). From here on all layers recompute their "
                "activations: the same numbers, about a third slower."
            )
            return
        if self.micro_batch == 1:
            error = HardwareError(self.hooks.out_of_memory(found, 1))
            error.is_told_elsewhere = self.args.process_index > 0
            raise error
        self.divisor *= 2
        size = self.micro_batch
        self.hooks.warn(
            f"out of memory {where} ({found.reason}). From here on "
            f"{size} sequence{'s' * (size > 1)} at a time instead of "
            f"{self.args.per_device_train_batch_size}, and {self.divisor} times as often: every "
            "update still trains on the same rows."
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._checked_norm(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._checked_norm(super()._get_grad_norm(model))

    def _checked_norm(self, grad_norm: Any) -> Any:
        """An fp16 scaler meets infinite gradients by design: it skips the step and halves."""
        figures = self._figures()
        losses = [one[0] for one in figures]
        if not all(map(math.isfinite, losses)):
            faulty = [origin for one in self.hooks.gathered(self._faulty) for origin in one]
            self.stop("loss", sum(losses), faulty)
        finite = bool(torch.isfinite(torch.as_tensor(grad_norm)))
        if not finite and (
            self.accelerator.scaler is None or self.accelerator.scaler.get_scale() < 1.0
        ):
            mine = [origin for batch in self._window for origin in batch["origins"]]
            origins = [origin for one in self.hooks.gathered(mine) for origin in one]
            self.stop("gradient norm", float(grad_norm), origins)
        self._book_update(figures)
        return grad_norm

    def _figures(self) -> list[list[float]]:
        """Of each process: the loss, the real tokens and the places of the update under way."""
        tokens = sum(batch["num_tokens"] for batch in self._window)
        places = sum(batch["input_ids"].numel() for batch in self._window if batch["items"])
        mine = [self._window_loss, float(tokens), float(places)]
        return [mine] if self.args.world_size == 1 else self._gathered(mine)

    def _book_update(self, figures: list[list[float]]) -> None:
        """Count what the update under way was made of."""
        origins = "\n".join(origin for batch in self._window for origin in batch["update_origins"])
        loss = sum(one[0] for one in figures) / len(figures)
        tokens = int(sum(one[1] for one in figures))
        places = int(sum(one[2] for one in figures))
        progress = self.progress
        progress.num_real_tokens += tokens
        progress.num_padding_tokens += places - tokens
        progress.first_loss = loss if progress.first_loss is None else progress.first_loss
        progress.last_loss = loss
        progress.total_loss += loss
        progress.unlogged_losses += (loss,)
        progress.eval_loss = None
        progress.order_digest = hashlib.sha256(
            f"{progress.order_digest}\n{origins}".encode()
        ).hexdigest()
        self._window, self._window_loss = [], 0.0

    def _gathered(self, values: list[float]) -> list[list[float]]:
        mine = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        rows: list[list[float]] = self.accelerator.gather(mine[None]).tolist()
        return rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the loss as we count it, which a resumed run goes on counting.

        Of the closing line only that is left: the Trainer's other figures are of the last attempt.
        """
        if "train_loss" in logs:
            logs = {"train_loss": self.progress.total_loss / max(self.progress.update, 1)}
        if "loss" in logs:
            losses = self.progress.unlogged_losses
            logs["loss"] = sum(losses) / len(losses) if losses else float("nan")
            self.progress.unlogged_losses = ()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The loss per supervised token of the held-out rows, whatever batches they come in."""
        assert self.held_out is not None
        metrics = {"eval_loss": self.held_out.measure(self.own_model, self.hooks.warn)}
        self.progress.eval_loss = metrics["eval_loss"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except GivenUp as given_up:
            self.stop_signal = given_up.signal_number
            self.progress.is_evaluation_due = True
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True
            self.hooks.save_last()

    def make_up_evaluation(self) -> None:
        """Evaluate the update that is gone on from, where a signal came before it was, and save it
        as it then is.

        Raises:
            GivenUp: a signal came meanwhile; the checkpoint is as it was.
        """
        if not self.progress.is_evaluation_due:
            return
        if self.held_out is not None:
            self._evaluate(None, None)
        self.progress.is_evaluation_due = False
        self.hooks.save()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.hooks.save()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """With the rates of the recipe in its groups: a schedule by updates puts them there too,
        but not one by the eval loss.
        """
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            optimizer = super().create_optimizer(model)
        else:
            optimizer = self.optimizer = self._loraplus_optimizer(self.loraplus_lr_ratio)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def _loraplus_optimizer(self, ratio: float) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model=self.model,
            optimizer_cls=optimizer_cls,
            lr=kwargs.pop("lr"),
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **kwargs,
        )
        return optimizer

    def stop(self, what: str, value: float, origins: list[str]) -> None:
        """Save what was good, which the weights still are: this step has not changed them.

        Called by all processes.
        """
        kept = self.hooks.keep_last_good(self.state.global_step)
        shown = ", ".join(origins[:8]) + (
            f" and {len(origins) - 8} more" if len(origins) > 8 else ""
        )
        error = TrainingError(
            f"the {what} became {value} at step {self.state.global_step + 1}, on the batch made of "
            f"{shown}. {kept}Look at those rows, or lower train.learning_rate."
        )
        error.is_told_elsewhere = self.args.process_index > 0
        raise error


def _apart(model: nn.Module) -> AbstractContextManager[Any]:
    """Without an exchange of gradients in the backward pass, which average_gradients does."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def for_the_model(inputs: Batch) -> Batch:
    """A batch without what is there for people."""
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
