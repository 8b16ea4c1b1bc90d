"""Everything that training needs, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_kit.data.prepare import Part, prepare_eval, prepare_train
from qlora_kit.environment import Hardware, launcher_settings
from qlora_kit.evaluate.evaluate import window_size
from qlora_kit.launcher import require_launch
from qlora_kit.model.adapter import Adapted, attach_adapter
from qlora_kit.model.base import Base, load_base, prepare_for_training, upcasts_norms
from qlora_kit.model.qat.aware import Aware, aware_of
from qlora_kit.model.qat.room import require_memory, room_for_each
from qlora_kit.model.shared import require_same_base, state_checksum
from qlora_kit.processes import Processes
from qlora_kit.recipe import Recipe, recipe_hash
from qlora_kit.report import narrate
from qlora_kit.report.reporter import Reporter
from qlora_kit.runtime.forward import context_tokens
from qlora_kit.startup import UNTIMED, Laps
from qlora_kit.train.arguments import require_tf32, resolve_training_dtypes
from qlora_kit.train.batching import Batching, kernels_left, plan_batches
from qlora_kit.train.memory import cgroup_limit_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import QuantizationSpec


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs, before anything is written."""

    base: Base
    train: Part
    held_out: Part
    adapted: Adapted
    batches: Batching
    precision: str

    def described(self, recipe: Recipe) -> tuple[PeftModel, Base, QuantizationSpec, str]:
        """What an adapter's files are written from."""
        return self.adapted.model, self.base, recipe.quantization, recipe_hash(recipe)


def prepare(
    recipe: Recipe,
    hardware: Hardware,
    processes: Processes,
    reporter: Reporter,
    laps: Laps = UNTIMED,
) -> Prepared:
    """Load the base, render the data, attach a fresh adapter."""
    dtypes = resolve_training_dtypes(recipe, hardware)
    compute_dtype, why, precision = dtypes.compute, dtypes.why, dtypes.precision
    require_tf32(recipe.train.tf32, hardware)
    processes.together(
        lambda: require_launch(
            launcher_settings(), recipe, precision, hardware.device, processes.count
        )
    )
    dtype: torch.dtype = getattr(torch, compute_dtype)
    has_wide_norms = upcasts_norms(recipe.quantization, dtype)
    narrate.hardware(reporter, hardware, compute_dtype, why, precision, has_wide_norms)

    aware = aware_of(recipe.quantization_aware, recipe.export.merge_options.dtype, dtype)
    base = _load(recipe, dtype, why, aware, hardware, processes, reporter, laps)
    if recipe.evaluate.perplexity and recipe.data.has_eval_rows:
        # Rather now than after training.
        processes.together(
            lambda: window_size(context_tokens(base.model), recipe.evaluate, recipe.data)
        )
    prepare_for_training(base.model, has_wide_norms)
    narrate.base(reporter, base, recipe.quantization)
    laps.lap("check of the base")

    train, held_out = processes.first_here(
        lambda: (
            prepare_train(recipe.data, base.tokenizer, base.stop_ids),
            prepare_eval(recipe.data, base.tokenizer, base.stop_ids),
        )
    )
    narrate.data(reporter, train, held_out, base.tokenizer)
    laps.lap("data")

    adapted = processes.together(
        lambda: attach_adapter(base, recipe.lora, recipe.train.seed, aware)
    )
    batches = processes.together(
        lambda: plan_batches(adapted.model, base, train, held_out.sequences, recipe.data)
    )
    narrate.left_out(reporter, kernels_left())
    narrate.adapter(reporter, adapted, recipe)
    laps.lap("adapter")
    return Prepared(base, train, held_out, adapted, batches, precision)


def _load(
    recipe: Recipe,
    dtype: torch.dtype,
    why: str,
    aware: Aware | None,
    hardware: Hardware,
    processes: Processes,
    reporter: Reporter,
    laps: Laps,
) -> Base:
    """The base in every process, the same in each, where the memory is enough for training it."""
    room = room_for_each(
        hardware,
        recipe.train.max_memory_mib,
        container_bytes=cgroup_limit_bytes(),
        num_processes_here=processes.count_here,
    )
    is_shared = processes.count > 1 and recipe.quantization.is_quantized
    base = (processes.first_here if is_shared else processes.together)(
        lambda: load_base(
            recipe.model,
            recipe.quantization,
            dtype,
            why,
            hardware,
            lora=recipe.lora,
            aware=recipe.quantization_aware,
            is_shared=is_shared,
            before_reading=lambda skeleton: require_memory(
                skeleton, aware, recipe.train.optim, dtype, room
            ),
            reporter=reporter,
            laps=laps,
        )
    )
    if processes.count > 1:
        require_same_base(processes.gathered(state_checksum(base.model)))
    return base
