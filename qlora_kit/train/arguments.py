"""From a TrainSpec to the Trainer's arguments: the one place that builds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.environment import Hardware, resolve_compute_dtype
from qlora_kit.errors import HardwareError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from qlora_kit.recipe import Recipe, TrainSpec

_DTYPE_OF = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_PRECISION_OF = {dtype: precision for precision, dtype in _DTYPE_OF.items()}


@dataclass(frozen=True)
class TrainingDtypes:
    """What a recipe's training computes in on one machine."""

    compute: str
    """dtype of the base's products, as torch calls it."""
    why: str
    precision: str
    """Autocast: `bf16`, `fp16` or `fp32`."""


def resolve_training_dtypes(recipe: Recipe, hardware: Hardware) -> TrainingDtypes:
    """Of `quantization.compute_dtype` and `train.precision` the one that is said decides, and the
    other follows: a base in bfloat16 could not be trained in float32.

    Raises:
        HardwareError: the machine has no units for what was asked.
    """
    asked, precision = recipe.quantization.compute_dtype, recipe.train.precision
    if asked == "auto" and precision != "auto":
        resolve_precision(precision, _DTYPE_OF[precision], hardware)
        return TrainingDtypes(_DTYPE_OF[precision], f"train.precision is {precision}", precision)
    compute, why = resolve_compute_dtype(asked, hardware)
    return TrainingDtypes(compute, why, resolve_precision(precision, compute, hardware))


def resolve_precision(asked: str, compute_dtype: str, hardware: Hardware) -> str:
    """Autocast precision: `auto` follows the compute dtype.

    Raises:
        HardwareError: the machine has no units for what was asked.
    """
    precision = _PRECISION_OF[compute_dtype] if asked == "auto" else asked
    if precision == "bf16" and not hardware.has_bf16:
        raise HardwareError(f"train.precision is bf16, but {hardware.reason}; use auto or fp32.")
    if precision == "fp16" and not hardware.native_fp16:
        raise HardwareError(
            f"train.precision is fp16, but {hardware.device_name} has no float16 units; "
            "use auto or fp32."
        )
    return precision


@dataclass(frozen=True)
class AutoOptimizer:
    """What `train.optim: auto` stands for."""

    name: str
    why: str


def optimizer_for(device: str, *, is_sharded: bool = False) -> AutoOptimizer:
    """AdamW each time. On a CPU bitsandbytes' 8-bit optimizers took some twenty times as long as
    torch's fused one (docs/performance.md, "Optimizers on a CPU").
    """
    if is_sharded:
        return AutoOptimizer("adamw_torch_fused", "8-bit ones do not know sharded parameters")
    if device == "cpu":
        return AutoOptimizer("adamw_torch_fused", "faster on a CPU than those of 8 bits")
    return AutoOptimizer("paged_adamw_8bit", "2 bytes of state a trained number, and not 8")


def require_tf32(asked: bool | None, hardware: Hardware) -> None:
    """Raises HardwareError where TF32 is asked of a machine without it."""
    if asked and not hardware.native_tf32:
        raise HardwareError(
            f"train.tf32 is true, but {hardware.device_name} has no TF32; remove it."
        )


def training_arguments(
    spec: TrainSpec,
    precision: str,
    hardware: Hardware,
    output_dir: Path,
    run_name: str,
    *,
    num_updates: int,
    accumulation: int,
) -> TrainingArguments:
    """Upstream arguments; the order of the data, the log, evaluation and checkpoints are ours.

    To the Trainer the whole of training is one pass of `num_updates` updates.
    """
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        run_name=run_name,
        per_device_train_batch_size=spec.per_device_train_batch_size,
        per_device_eval_batch_size=spec.per_device_eval_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=num_updates,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler_type,
        lr_scheduler_kwargs=dict(spec.lr_scheduler_kwargs),
        warmup_steps=spec.warmup_steps,
        optim=spec.optim,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.adam_beta1,
        adam_beta2=spec.adam_beta2,
        adam_epsilon=spec.adam_epsilon,
        max_grad_norm=spec.max_grad_norm,
        neftune_noise_alpha=spec.neftune_noise_alpha,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=spec.tf32 if hardware.native_tf32 else None,
        seed=spec.seed,
        logging_steps=spec.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would replace a NaN by an average and go on
        # Cadence decides; reduce_lr_on_plateau is refused where nothing seems to be evaluated.
        eval_strategy="no" if spec.eval_strategy == "no" else "steps",
        eval_steps=num_updates + 1,
        save_strategy="no",
        report_to=[one for one in spec.report_to if one != "tensorboard"] or "none",
        use_cpu=hardware.device == "cpu",
        dataloader_pin_memory=hardware.device != "cpu",
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},  # batches hold more than tensors
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # every process has made the same ones
    )
    # Beside a second GPU the Trainer would wrap the model in DataParallel and double the batch.
    arguments._n_gpu = 1
    return arguments
