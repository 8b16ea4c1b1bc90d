"""`train:` optimisation, precision, and what is logged and saved on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec, without_effect
from qlora_kit.recipe.schedule import DEFAULT_WARMUP, Schedule, schedule_faults
from qlora_kit.recipe.size import size_bytes

# Of which families of optimizers transformers hands each of these on to.
_READERS_OF = {
    "adam_beta1": ("adam", "ademamix", "lion"),
    "adam_beta2": ("adam", "ademamix", "lion"),
    "adam_epsilon": ("adam", "ademamix"),
}

Optimizer = Literal[
    "auto",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop",
    "rmsprop_bnb_8bit",
    "adagrad",
    "adafactor",
    "sgd",
]

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainSpec(Spec):
    """The Hugging Face Trainer's settings, under its own names."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training rows; max_steps overrides it."""

    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer updates."""

    per_device_train_batch_size: int = Field(default=4, gt=0)
    """Sequences per device in one forward-backward."""

    per_device_eval_batch_size: int = Field(default=8, gt=0)
    """Sequences per device in one evaluation forward."""

    gradient_accumulation_steps: int = Field(default=4, gt=0)
    """Forward-backwards per update; global batch = this × per device × devices."""

    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third slower. `auto` lets as
    few layers recompute as the memory asks for, by a count of what the longest batch keeps."""

    fused_loss: bool = True
    """Compute logits at supervised places alone, a chunk at a time; the same loss. It is tried on
    the model first, and left out with a warning where it does not come out the same."""

    fused_lora: bool = True
    """Compute LoRA and its frozen layer as one operation, and layers that share an input together;
    the same numbers up to rounding. Tried first, too; what it does not cover stays with PEFT."""

    fused_mlp: bool = True
    """Let MLPs keep what their layers make for the backward pass (gated ones two of four wide
    tensors), and make what comes between again there: the same numbers. Tried first, too."""

    fused_norm: bool = True
    """Compute RMSNorm and LayerNorm as one operation that keeps its input alone: the same numbers
    up to rounding of RMSNorm's gradients. Tried first, too."""

    fused_rotary: bool = True
    """Compute the rotary embedding of queries and keys as one operation: the same numbers up to
    rounding. Tried first, too."""

    use_liger_kernel: Literal["auto"] | bool = "auto"
    """Let Liger's Triton kernels compute on a GPU what fused_mlp, fused_norm and fused_rotary make
    one operation of. `auto` takes each where it passes the trial and is faster than
    torch's operations, timed when a run starts; true, where it passes. It is an extra:
    `pip install 'qlora-kit[liger]'`."""

    use_onednn: Literal["auto"] | bool = "auto"
    """Let oneDNN multiply with frozen weights on a CPU, and weights that stay lie in its layout; it
    comes with fused_lora. `auto` takes each where it passes the trial and is faster than what torch
    takes by itself (in float32 MKL, as a rule), timed once on a machine, and has it make the logits
    alone where that is faster and the rest is not; true, where it passes."""

    blockwise_attention: Literal["auto"] | bool = "auto"
    """Compute attention on a CPU in blocks of queries, each with the keys up to its own end alone,
    for examples of 192 to 2,048 tokens (768 in bfloat16) that attention takes by themselves
    (data.padding_free, data.packing). The same numbers up to rounding. `auto` takes it where it
    gives what torch's kernel gives and is faster, timed when a run starts; true, where it gives the
    same."""

    optim: Optimizer = "auto"
    """Optimizer. `auto` is AdamW: on a GPU `paged_adamw_8bit`, with 2 bytes of state a trainable
    number, which spill to host memory under pressure; on a CPU, where 8 bits take longer than they
    save, and under FSDP `adamw_torch_fused`, with 8. A run is gone on with as it was begun."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""

    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""

    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the denominator of the update."""

    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """Learning rate of B as a multiple of A's, LoRA+ (arXiv:2402.12354); 16 is the paper's."""

    lr_scheduler_type: Schedule = "cosine"
    """Learning-rate schedule."""

    lr_scheduler_kwargs: dict[str, float | int | str | bool] = Field(default_factory=dict)
    """Further arguments of the schedule, such as `num_cycles` or `min_lr`."""

    warmup_steps: float = Field(default=DEFAULT_WARMUP, ge=0)
    """Updates of linear warm-up; below 1 it is a share of all updates."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the gradient's norm to this; 0 turns clipping off."""

    neftune_noise_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings, NEFTune (arXiv:2310.05914); 5 is a usual value."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast dtype; `auto` follows quantization.compute_dtype, which follows this where it is
    itself `auto`. fp16 trains with a scaler."""

    tf32: bool | None = None
    """Allow TF32 in float32 products; unset leaves torch's own setting."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds Python, NumPy, torch, the adapter's start and the order of rows."""

    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    """Order of rows; group_by_length wastes the least on padding."""

    logging_steps: int = Field(default=5, gt=0)
    """Updates between two lines of log.jsonl."""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to compute the eval loss during training."""

    eval_steps: int | None = Field(default=None, gt=0)
    """Updates between evaluations, with eval_strategy: steps."""

    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint; the final adapter is written in any case."""

    save_steps: int = Field(default=500, gt=0)
    """Updates between checkpoints, with save_strategy: steps."""

    save_minutes: float | None = Field(default=None, gt=0)
    """Also write a checkpoint after so many minutes without one."""

    save_total_limit: int | None = Field(default=2, gt=0)
    """Checkpoints to keep, newest first."""

    keep_best: bool = False
    """Keep the checkpoint with the lowest eval loss as well, whatever its age: of those that are
    there, each with the loss after its own update."""

    max_memory_mib: int | None = Field(default=None, gt=0)
    """Use no more memory than this, of the GPU where there is one, else of this process, as if
    there were no more. Where it runs out, fewer sequences are trained on at a time."""

    memory_budget: Literal["auto"] | str = "auto"
    """Train as fast as can be in this much memory, such as 20GiB: of this process on a CPU, of what
    is allocated on a GPU. How many sequences are taken at a time, how many layers recompute, and
    whether unpacked weights stay or activations wait in the host's memory is chosen by a count of
    what the longest batch keeps; every update trains on the same. `auto` takes the recipe's
    sequences at a time, lets layers recompute by what is free, and on a CPU, where none has to,
    lets unpacked weights stay in the rest."""

    report_to: tuple[Tracker, ...] = ()
    """Experiment trackers; none by default, and never any telemetry of our own."""

    @property
    def memory_budget_bytes(self) -> int | None:
        """None: auto, or what contradictions() finds fault with."""
        return None if self.memory_budget == "auto" else size_bytes(self.memory_budget)

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        """YAML reads an unquoted `no` as false."""
        return "no" if value is False else value

    def contradictions(self) -> Iterator[Fault]:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            yield Fault("eval_steps", "eval_strategy: steps needs it", "try eval_steps: 50")
        if self.memory_budget != "auto" and not self.memory_budget_bytes:
            message = f"must be auto or a size with its unit, got {self.memory_budget!r}"
            yield Fault("memory_budget", message, "try memory_budget: 20GiB")
        yield from self._options_without_effect()
        if self.keep_best:
            yield from self._keep_best_faults()
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield Fault(
                "warmup_steps",
                f"{self.warmup_steps:g} is not below max_steps ({self.max_steps})",
                "shorten the warm-up",
            )
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            message = f"must be whole above 1, got {self.warmup_steps:g}"
            yield Fault("warmup_steps", message, "below 1 it is a share of all updates")
        if self.lr_scheduler_type == "reduce_lr_on_plateau" and self.eval_strategy == "no":
            message = "reduce_lr_on_plateau needs evaluation during training"
            yield Fault("lr_scheduler_type", message, "set eval_strategy: steps")
        yield from schedule_faults(
            self.lr_scheduler_type,
            self.lr_scheduler_kwargs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
        )

    def _keep_best_faults(self) -> Iterator[Fault]:
        if "no" in (self.eval_strategy, self.save_strategy):
            message = "the best checkpoint is known by its eval loss"
            hint = "set eval_strategy and save_strategy to epoch, or both to steps"
            yield Fault("keep_best", message, hint)
        elif self.eval_strategy != self.save_strategy or (
            self.eval_steps is not None and self.save_steps % self.eval_steps
        ):
            message = "every checkpoint must fall on an evaluation"
            hint = "use the same strategy for both, with save_steps a multiple of eval_steps"
            yield Fault("keep_best", message, hint)

    def _options_without_effect(self) -> Iterator[Fault]:
        if self.eval_strategy != "steps":
            why = f"with eval_strategy: {self.eval_strategy}"
            yield from without_effect(self, ("eval_steps",), why, "set eval_strategy: steps")
        if self.save_strategy != "steps":
            why = f"with save_strategy: {self.save_strategy}"
            yield from without_effect(self, ("save_steps",), why, "set save_strategy: steps")
        if self.save_strategy == "no":
            why = "with save_strategy: no"
            yield from without_effect(self, ("save_total_limit",), why, "remove it")
        unread = tuple(
            name
            for name, readers in _READERS_OF.items()
            if self.optim != "auto" and not any(reader in self.optim for reader in readers)
        )
        yield from without_effect(self, unread, f"with optim: {self.optim}", "remove it")
