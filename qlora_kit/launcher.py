"""What a launcher was told to do, held against the recipe and the machine. No torch.

accelerate hands its configuration on through environment variables, which upstream obeys in part
and passes over in part without a word. Whatever would not happen as asked is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.environment import LauncherSettings
from qlora_kit.errors import LaunchError

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe

_MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
_SPREAD = "its optimizer's state is spread over the processes and cannot be put back exactly yet"
_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def require_launch(
    asked: LauncherSettings, recipe: Recipe, precision: str, device: str, num_processes: int
) -> None:
    """Raises LaunchError with everything that the launcher was asked for and would not happen."""
    faults = [*_faults(asked, precision)]
    if asked.fsdp:
        faults += _fsdp_faults(asked, recipe, device, num_processes)
    if asked.deepspeed:
        faults += _deepspeed_faults(asked, recipe, device)
    if asked.is_sharded:
        faults += _sharded_faults(recipe)
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise LaunchError(f"the launcher asks for what would not happen:\n{listed}")


def require_going_on(asked: LauncherSettings, checkpoint: Path | None) -> None:
    """Raises LaunchError where the launcher asks for what cannot go on from this checkpoint."""
    if asked.deepspeed and checkpoint is not None:
        raise LaunchError(
            f"{checkpoint} cannot be gone on from under DeepSpeed: {_SPREAD}. Launch with torchrun "
            "or FSDP2, or train anew with --fresh."
        )


def _faults(asked: LauncherSettings, precision: str) -> Iterator[str]:
    if asked.mixed_precision not in ("", "no", _MIXED[precision]):
        yield (
            f"mixed_precision: {asked.mixed_precision}, but the recipe trains in {precision}; set "
            "mixed_precision: 'no' in the launcher's configuration, and the recipe decides"
        )
    if asked.dynamo_backend not in ("", "NO"):
        yield (
            f"dynamo_backend: {asked.dynamo_backend}, but nothing here is compiled; set it to 'no'"
        )
    if asked.left_alone:
        yield (
            "several processes, of which accelerate starts only one (MASTER_PORT is set, and "
            "WORLD_SIZE is not); launch them with torchrun --nproc-per-node, or with accelerate's "
            "--multi_gpu"
        )
    for name, is_asked in (("Megatron-LM", asked.megatron), ("parallelism_config", asked.parallel)):
        if is_asked:
            yield f"{name}, but training here is data parallel; remove it from the configuration"


def _fsdp_faults(
    asked: LauncherSettings, recipe: Recipe, device: str, num_processes: int
) -> Iterator[str]:
    quantization, train = recipe.quantization, recipe.train
    if device == "cpu":
        yield "FSDP on a CPU, which would silently become DDP; launch with torchrun instead"
    if num_processes == 1:
        yield "FSDP with one process, which shards nothing; launch without it"
    if asked.fsdp_version != "2":
        yield f"fsdp_version: {asked.fsdp_version}; set it to 2"
    if asked.fsdp_ram_efficient:
        yield (
            "fsdp_cpu_ram_efficient_loading, which leaves a base that is checked on loading empty; "
            "set it to false"
        )
    if asked.fsdp_activation_checkpointing and train.gradient_checkpointing:
        yield (
            "fsdp_activation_checkpointing beside the recipe's train.gradient_checkpointing; set "
            "one of them to false"
        )
    if 4 in quantization.all_bits and quantization.quant_storage == "uint8":
        yield (
            "FSDP of 4-bit weights packed in uint8, which every GPU would hold whole; set "
            "quantization.quant_storage: bfloat16"
        )
    if 8 in quantization.all_bits:
        yield "FSDP of an 8-bit base or of single 8-bit layers cannot be; use 4 or 16 bits"
    if train.optim not in _TORCH_OPTIMIZERS:
        yield (
            f"FSDP with train.optim: {train.optim}, which does not know sharded parameters; set "
            "train.optim: adamw_torch"
        )


def _deepspeed_faults(asked: LauncherSettings, recipe: Recipe, device: str) -> Iterator[str]:
    if find_spec("deepspeed") is None:
        yield "DeepSpeed, which is not installed; pip install deepspeed"
    if device == "cpu":
        yield "DeepSpeed on a CPU; launch with torchrun instead"
    if asked.deepspeed_file not in ("", "none"):
        yield (
            f"deepspeed_config_file: {asked.deepspeed_file}, which is not held against the recipe; "
            "write zero_stage and what else it says under deepspeed_config"
        )
    elif asked.zero_stage not in ("2", "3"):
        yield f"ZeRO stage {asked.zero_stage or 'unset'}; set zero_stage to 2 or 3"
    accumulation = str(recipe.train.gradient_accumulation_steps)
    if asked.accumulation not in ("", "auto", accumulation):
        yield (
            f"gradient_accumulation_steps: {asked.accumulation}, but the recipe says "
            f"{accumulation}; set it to auto"
        )
    if not _clips_to(asked.clipping, recipe.train.max_grad_norm):
        yield (
            f"gradient_clipping: {asked.clipping}, but the recipe says train.max_grad_norm: "
            f"{recipe.train.max_grad_norm:g}; set it to auto"
        )
    asking = [f"train.save_strategy: {recipe.train.save_strategy}"]
    asking *= recipe.train.save_strategy != "no"
    asking += ["train.save_minutes"] * (recipe.train.save_minutes is not None)
    if asking:
        yield (
            f"DeepSpeed with checkpoints ({', '.join(asking)}): {_SPREAD}; set "
            "train.save_strategy: no without train.save_minutes, or use DDP or FSDP"
        )


def _clips_to(asked: str, max_grad_norm: float) -> bool:
    """Whether DeepSpeed clips gradients to the recipe's norm; `auto` takes it from there."""
    if asked in ("", "auto"):
        return True
    try:
        return float(asked) == max_grad_norm
    except ValueError:
        return False


def _sharded_faults(recipe: Recipe) -> Iterator[str]:
    if recipe.train.eval_strategy != "no":
        yield (
            "a sharded model with train.eval_strategy: the held-out loss is taken by each process "
            "alone; leave it on no (the held-out rows are evaluated after training)"
        )
    if recipe.train.max_memory_mib is not None:
        yield "a sharded model with train.max_memory_mib; remove it"
    if recipe.quantization_aware is not None:
        yield (
            "a sharded model with quantization_aware, which quantizes whole weights; launch with "
            "torchrun instead"
        )
