"""The batch that needs the most memory, tried before hours are spent on the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.data.collate import Batch
from qlora_kit.errors import HardwareError
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.out_of_memory import RanOut, first_of, free_memory, is_out_of_memory, ran_out
from qlora_kit.train.loader import collate
from qlora_kit.train.sharded import is_sharded
from qlora_kit.train.snapshot import put_random_state_back, random_state

if TYPE_CHECKING:
    from torch import nn

    from qlora_kit.model.base import Base
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.surroundings import Surroundings
    from qlora_kit.train.trainer import QloraTrainer

_MIB = 1024**2


class WorstBatch(TrainerCallback):
    """Runs the longest sequences through forward and backward, and through evaluation.

    On a CPU without train.max_memory_mib there is nothing to learn from it: memory that runs out
    there ends the process and not the attempt.
    """

    def __init__(
        self, trainer: QloraTrainer, batches: Batching, spec: TrainSpec, around: Surroundings
    ):
        self.trainer = trainer
        self.batches = batches
        self.spec = spec
        self.around = around

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        self.around.laps.lap("trainer")
        device = self.around.hardware.device
        if device == "cpu" and self.spec.max_memory_mib is None:
            return
        if args.deepspeed_plugin is not None:
            return  # its engine keeps gradients that nobody asked for
        before = random_state()
        items = self.batches.longest(args.per_device_train_batch_size)
        batch = {**collate(items, self.batches.collator), "update_origins": []}
        while not self._fits(batch):
            pass
        if self.trainer.held_out is not None and self.spec.eval_strategy != "no":
            self.trainer.held_out.try_longest(self.trainer.own_model, self.around.reporter.warn)
        free_memory(device)
        put_random_state_back(before)
        longest = max(item.num_tokens for item in items)
        self.around.laps.lap("worst batch")
        self.around.reporter.say(
            f"worst     {len(items)} sequences of up to {longest:,} tokens fit"
            + (f", {-(-len(items) // self.trainer.divisor)} at a time" * (self.trainer.divisor > 1))
        )

    def _fits(self, batch: Batch) -> bool:
        """Whether it does, on every process; if not, the micro-batch is halved on all of them."""
        trainer = self.trainer
        mine: RanOut | None = None
        try:
            trainer.forward_and_backward(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            mine = ran_out(error, batch["input_ids"].shape[-1])
        if mine is not None and trainer.waits_inside:
            raise HardwareError(trainer.hooks.out_of_memory(mine, trainer.micro_batch))
        trainer.own_model.zero_grad()
        free_memory(self.around.hardware.device)
        found = first_of(self.around.processes.gathered(mine))
        if found is not None:
            trainer.divide_further(found, "on a trial of the longest sequences")
        return found is None


def what_would_help(
    found: RanOut, size: int, base: Base, spec: TrainSpec, around: Surroundings
) -> str:
    """With the figures of this model and this batch, where `size` sequences at a time were too
    much and cannot be fewer.
    """
    tokens = found.num_tokens
    vocabulary = base.model.config.get_text_config().vocab_size
    logits = 4 * tokens * vocabulary / _MIB
    held = base.quantized.weight_bytes / _MIB
    if size > 1:
        accumulation = spec.gradient_accumulation_steps * size
        ways = [
            "train fewer at a time (train.per_device_train_batch_size: 1, "
            f"train.gradient_accumulation_steps: {accumulation}, which is the same global batch; "
            "processes that share a model cannot agree on it while they train)"
        ]
    else:
        ways = [f"lower data.max_length (one sequence of {tokens:,} tokens is too much)"]
    if not spec.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing: true")
    aware = fake_quantization_of(base.model)
    if aware is not None and aware.aware.spec.train == "full":
        ways.append("train an adapter (quantization_aware.train: adapter)")
    if base.quantized.num_quantized == 0 and aware is None:
        ways.append("set quantization.load_in_4bit: true (the base is not quantized)")
    if "8bit" not in spec.optim and not is_sharded(base.model):
        ways.append(f"set train.optim: paged_adamw_8bit (now {spec.optim})")
    if spec.max_memory_mib is not None:
        ways.append(f"raise train.max_memory_mib (now {spec.max_memory_mib:,})")
    phase, peak = around.memory.peak
    at_a_time = "one sequence" if size == 1 else f"{size} sequences"
    return (
        f"out of memory with {at_a_time} at a time ({found.reason}). "
        f"The base takes {held:,.0f} MiB, "
        f"the logits of one sequence {logits:,.0f} MiB, the peak so far was {peak / _MIB:,.0f} MiB "
        f"({phase}). What would help: {'; '.join(ways)}."
    )
