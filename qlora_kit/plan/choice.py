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
    room_for_residents,
    room_for_unpacked,
)
from qlora_kit.model.fused.residents import NO_ROOM, Room

if TYPE_CHECKING:
    from qlora_kit.plan.rows import WorstBatch
    from qlora_kit.plan.trial import ImaginedTraining
    from qlora_kit.recipe import TrainSpec


@dataclass(frozen=True)
class Choice:
    """How training would fit the memory."""

    way: Way
    stays: Room = NO_ROOM
    """Room for frozen weights that stay."""


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
    device = imagined.device
    update = bytes_of_update(imagined.model, spec.optim)
    weights = sum(imagined.standing.values())
    counts = counts_of_recomputing(
        spec.gradient_checkpointing, imagined.num_layers > 0, imagined.num_layers
    )
    budget = spec.memory_budget_bytes
    if budget is None:
        free = there_bytes - framework_bytes - weights
        room = room_for_kept(
            free, update, imagined.num_entries, sum(lengths_of_rows(worst.items)), device
        )
        return _without_a_budget(imagined, spec, worst, room)
    # Of a GPU what torch has allocated counts, of a CPU the whole process.
    is_on_cpu = device == "cpu"
    standing = weights + update + framework_bytes * is_on_cpu
    situation = Situation(
        imagined.kept, worst.items, standing, device, counts, imagined.num_entries
    )
    way = situation.fastest(budget)
    if way is None:
        raise situation.nothing_fits(spec.memory_budget)
    left = budget - situation.peak_bytes(way)
    if not is_on_cpu:
        return Choice(way)
    return Choice(way, room_for_residents(imagined.model, left, lambda: imagined.reorders))


def _without_a_budget(
    imagined: ImaginedTraining, spec: TrainSpec, worst: WorstBatch, room_bytes: float
) -> Choice:
    """As `qlora_kit.train.recompute.choose_recompute`."""
    asked, num_layers, kept = spec.gradient_checkpointing, imagined.num_layers, imagined.kept
    if asked is True or not num_layers:
        return Choice(Way(len(worst.items), num_layers))
    lengths = lengths_of_rows(worst.items)
    count = kept.fewest(lengths, room_bytes) if asked == "auto" else 0
    how = (count, lengths, imagined.device, lambda: imagined.reorders)
    stays = room_for_unpacked(imagined.model, room_bytes, kept, *how)
    return Choice(Way(len(worst.items), count), stays)
