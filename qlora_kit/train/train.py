"""Train an adapter: the builder of this package."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from qlora_kit.environment import Hardware
from qlora_kit.model.base import Base
from qlora_kit.report.reporter import Reporter
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.batching import Batching
from qlora_kit.train.callbacks import StepCallback
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.trainer import QloraTrainer

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.checkpoint.run_directory import RunDirectory
    from qlora_kit.recipe import TrainSpec


@dataclass(frozen=True)
class TrainResult:
    """What training did."""

    num_steps: int
    first_loss: float
    last_loss: float
    num_tokens: int
    """Real tokens, without padding, counted once per pass."""
    num_padding_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def num_update_steps(num_sequences: int, spec: TrainSpec, num_processes: int = 1) -> int:
    """Optimizer updates that the Trainer will make."""
    if spec.max_steps is not None:
        return spec.max_steps
    batches = math.ceil(num_sequences / (spec.per_device_train_batch_size * num_processes))
    per_epoch = max(math.ceil(batches / spec.gradient_accumulation_steps), 1)
    return math.ceil(spec.num_train_epochs * per_epoch)


def train_adapter(
    model: PeftModel,
    base: Base,
    batches: Batching,
    spec: TrainSpec,
    precision: str,
    hardware: Hardware,
    run_dir: RunDirectory,
    memory: MemoryWatch,
    reporter: Reporter,
    save: Callable[[Path], None],
) -> TrainResult:
    """Train in place; `save` writes the adapter into a folder, whole.

    Raises:
        TrainingError: a loss or gradient was not finite; the last good adapter is kept.
    """
    transformers.set_seed(spec.seed)
    model.config.use_cache = False
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    args = training_arguments(spec, precision, hardware, run_dir.folder, run_dir.folder.name)

    def keep_last_good(step: int) -> str:
        save(run_dir.last_good)
        return f"The adapter as it was after step {step} is kept in {run_dir.last_good}. "

    with reporter.progress("training", num_update_steps(batches.num_items, spec)) as progress:
        callback = StepCallback(run_dir.log, progress, memory, reporter)
        trainer = QloraTrainer(
            model=model,
            args=args,
            train_dataset=batches.train,
            eval_dataset=batches.held_out or None,
            data_collator=batches.collator,
            callbacks=[callback],
            loraplus_lr_ratio=spec.loraplus_lr_ratio,
            on_stop=keep_last_good,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        callback.trainer = trainer
        memory.phase("training")
        start = time.monotonic()
        with warnings.catch_warnings():
            # On a CPU paged optimizers run unpaged, which is what is meant there.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            trainer.train()
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_disable()
        base.model.disable_input_require_grads()
    model.config.use_cache = True
    model.eval()
    return TrainResult(
        num_steps=trainer.state.global_step,
        first_loss=trainer.step_losses[0],
        last_loss=trainer.step_losses[-1],
        num_tokens=trainer.num_real_tokens,
        num_padding_tokens=trainer.num_padding_tokens,
        seconds=seconds,
    )
