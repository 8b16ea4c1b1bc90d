"""The Hugging Face Trainer, stopped at the first number that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from qlora_kit.data.collate import NOT_FOR_THE_MODEL
from qlora_kit.errors import TrainingError
from qlora_kit.model.adapter import require_float32_trainables

if TYPE_CHECKING:
    from collections.abc import Callable


class QloraTrainer(Trainer):
    """Adds to the Trainer: a check of every loss and gradient, LoRA+, and a count of real tokens.

    Batches carry `origins`, the rows they were made of, so that a fault can name them, and
    `num_tokens`.
    """

    def __init__(
        self,
        *args: Any,
        loraplus_lr_ratio: float | None = None,
        on_stop: Callable[[int], str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.on_stop = on_stop
        self.num_real_tokens = 0
        self.num_padding_tokens = 0
        self.window_origins: list[str] = []
        self.step_losses: list[float] = []
        """Loss of each optimizer step: the mean over the supervised tokens of its batches."""
        self._window_loss = 0.0
        self._trainables_checked = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        if not self._trainables_checked:
            require_float32_trainables(model)
            self._trainables_checked = True
        origins, num_tokens = inputs["origins"], inputs["num_tokens"]
        inputs = for_the_model(inputs)
        self.window_origins += origins
        self.num_real_tokens += num_tokens
        self.num_padding_tokens += inputs["input_ids"].numel() - num_tokens
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self.stop("loss", float(loss), origins)
        self._window_loss += float(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._checked_norm(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._checked_norm(super()._get_grad_norm(model))

    def _checked_norm(self, grad_norm: Any) -> Any:
        """An fp16 scaler meets infinite gradients by design: it skips the step and halves."""
        finite = bool(torch.isfinite(torch.as_tensor(grad_norm)))
        if not finite and self.accelerator.scaler is None:
            self.stop("gradient norm", float(grad_norm), self.window_origins)
        if not finite and self.accelerator.scaler.get_scale() < 1.0:
            self.stop("gradient norm", float(grad_norm), self.window_origins)
        self.window_origins = []
        self.step_losses.append(self._window_loss)
        self._window_loss = 0.0
        return grad_norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Upstream reads lengths only off dictionaries; the rows here know their own."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            lengths=[row.num_tokens for row in rows],
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        return super().prediction_step(
            model, for_the_model(inputs), prediction_loss_only, ignore_keys
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = create_loraplus_optimizer(
            model=self.model,
            optimizer_cls=optimizer_cls,
            lr=kwargs.pop("lr"),
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **kwargs,
        )
        return self.optimizer

    def stop(self, what: str, value: float, origins: list[str]) -> None:
        """Save what was good, which the weights still are: this step has not changed them."""
        step = self.state.global_step + 1
        kept = self.on_stop(self.state.global_step) if self.on_stop else ""
        shown = ", ".join(origins[:8]) + (
            f" and {len(origins) - 8} more" if len(origins) > 8 else ""
        )
        raise TrainingError(
            f"the {what} became {value} at step {step}, on the batch made of {shown}. {kept}"
            "Look at those rows, or lower train.learning_rate."
        )


def for_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch without what is there for people."""
    return {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
