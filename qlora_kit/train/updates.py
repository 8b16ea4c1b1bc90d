"""How many updates a recipe makes, and of how many sequences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec


def items_per_update(spec: TrainSpec, num_processes: int) -> int:
    """The global batch, in sequences."""
    per_process = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    return per_process * num_processes


def num_update_steps(num_items: int, spec: TrainSpec, per_update: int | None = None) -> int:
    """Optimizer updates from start to end, of `per_update` sequences each; by default of as many
    as one process trains on.
    """
    if spec.max_steps is not None:
        return spec.max_steps
    per_pass = max(math.ceil(num_items / (per_update or items_per_update(spec, 1))), 1)
    return math.ceil(spec.num_train_epochs * per_pass)
