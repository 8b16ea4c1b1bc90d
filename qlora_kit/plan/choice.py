"""What training would choose for itself, by its own rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.memory.ways import (
    Situation,
    Way,
    bytes_of_update,
    counts_of_recomputing,
    lengths_of_rows,
    room_for_kept,
)

if TYPE_CHECKING:
    from qlora_kit.plan.rows import WorstBatch
    from qlora_kit.plan.trial import ImaginedTraining
    from qlora_kit.recipe import TrainSpec


@dataclass(frozen=True)
class Choice:
    """How training would fit the memory."""

    way: Way
    resident_bytes: int = 0
    """Room for unpacked weights that stay."""


def choice_of(
    imagined: ImaginedTraining,
    spec: TrainSpec,
    worst: WorstBatch,
    there_bytes: int,
    framework_bytes: int,
) -> Choice:
    """As `qlora_kit.train.budget.fit_memory`, where nothing else is in the memory.

    Args:
        there_bytes: that the device has for it.

    Raises:
        HardwareError: nothing fits train.memory_budget.
    """
    update = bytes_of_update(imagined.model, spec.optim)
    weights = sum(imagined.weights.values())
    counts = counts_of_recomputing(
        spec.gradient_checkpointing, imagined.num_layers > 0, imagined.num_layers
    )
    budget = spec.memory_budget_bytes
    if budget is None:
        count = counts[0]
        if len(counts) > 1:
            room = room_for_kept(there_bytes - framework_bytes - weights, update, imagined.device)
            count = imagined.kept.fewest(lengths_of_rows(worst.items), room)
        return Choice(Way(len(worst.items), count))
    # Of a GPU what torch has allocated counts, of a CPU the whole process.
    is_on_cpu = imagined.device == "cpu"
    standing = weights + update + framework_bytes * is_on_cpu
    situation = Situation(
        imagined.kept, worst.items, standing, imagined.device, counts, imagined.num_entries
    )
    way = situation.fastest(budget)
    if way is None:
        raise situation.nothing_fits(spec.memory_budget)
    return Choice(way, int(budget - situation.peak_bytes(way)) if is_on_cpu else 0)
