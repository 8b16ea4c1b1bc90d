"""The fastest way to train within a budget of memory, train.memory_budget, and training so.

The ways that there are, and which is taken, are in qlora_kit/memory/ways.py. Where something is
left of the budget, frozen weights stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_kit.memory.allocator import large_blocks_given_back
from qlora_kit.memory.process import resident_bytes
from qlora_kit.memory.ways import (
    Situation,
    Way,
    bytes_of_update,
    counts_of_recomputing,
    room_for_residents,
)
from qlora_kit.model.fused.residents import NO_ROOM, Residents, Room
from qlora_kit.train.fitting import divisor_of, sequences_before
from qlora_kit.train.known_kept import known_or_counted
from qlora_kit.train.loader import longest_of
from qlora_kit.train.memory import device_bytes
from qlora_kit.train.recompute import Recompute, choose_recompute

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.report.reporter import Reporter
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.loader import Item
    from qlora_kit.train.snapshot import Progress
    from qlora_kit.train.surroundings import Surroundings

_MIB = 2**20


@dataclass(frozen=True)
class Fit:
    """How training is made to fit."""

    recompute: Recompute
    divisor: int = 1
    """Parts that a micro-batch is divided into."""
    offloads: bool = False
    held_out_rows: int | None = None
    """At a time; None: as the recipe says."""
    is_tight: bool = False
    """Whether a budget on a CPU was met by giving up speed: freed memory then goes back at once."""

    def giving_back(self) -> AbstractContextManager[None]:
        return large_blocks_given_back(self.is_tight)

    def offloading(self) -> AbstractContextManager[object]:
        """Activations wait in the host's memory, where that was chosen."""
        if not self.offloads:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def fit_memory(
    model: PeftModel,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    is_sharded: bool,
    residents: Residents,
    before: Progress | None,
    key: str | None = None,
) -> Fit:
    """As fast as the budget allows, on all processes as on the one that has the least room;
    without a budget, as `choose_recompute` says.

    Args:
        residents: on a CPU is given what is left.
        before: of a run that goes on; it keeps to as many sequences at a time, if that fits:
            another number would round otherwise.
        key: see `known_or_counted`.

    Raises:
        HardwareError: nothing fits the budget.
    """
    longest = batches.longest(spec.per_device_train_batch_size)
    if spec.memory_budget_bytes is None or is_sharded or not longest:
        if spec.memory_budget_bytes is not None:
            around.reporter.warn(
                "train.memory_budget is left aside: what is kept is not known "
                + ("of a sharded model." if is_sharded else "without a sequence to look at.")
            )
        return Fit(choose_recompute(model, batches, spec, around, is_sharded, residents, key))
    _warn_of_more_than_there_is(spec, around)
    wanted = sequences_before(before, spec)
    processes = around.processes
    situation = processes.together(lambda: _situation(model, batches, spec, around, longest, key))
    way = processes.together(lambda: _fastest(situation, spec, wanted))
    fewest = min(processes.gathered(way.at_a_time))
    if fewest < way.at_a_time:
        way = _fastest(situation, spec, fewest)
    is_on_cpu, budget = around.hardware.device == "cpu", spec.memory_budget_bytes
    held_out = _longest_held_out(batches, spec)
    held_out_rows = min(processes.gathered(situation.most_held_out(held_out, budget)))
    stays = NO_ROOM
    if is_on_cpu:
        most = max(situation.peak_bytes(way), situation.held_out_bytes(held_out[:held_out_rows]))
        stays = room_for_residents(model, budget - most, residents.reorders)
        residents.give(stays)
    _tell(around.reporter, spec, situation, way, stays)
    if held_out_rows < len(held_out):
        around.reporter.say(f"          {held_out_rows} of {len(held_out)} held-out rows at a time")
    return Fit(
        Recompute(model, way.num_recomputing, len(situation.kept.layers), residents=residents),
        divisor_of(spec.per_device_train_batch_size, way.at_a_time),
        way.offloads,
        held_out_rows if held_out_rows < len(held_out) else None,
        is_on_cpu and way.gives_up_speed(situation.num_sequences),
    )


def _warn_of_more_than_there_is(spec: TrainSpec, around: Surroundings) -> None:
    there, budget = device_bytes(around.hardware), spec.memory_budget_bytes
    if budget is not None and budget > there:
        around.reporter.warn(
            f"train.memory_budget ({spec.memory_budget}) is more than the {there / 2**30:.1f} GiB "
            "that there are: what is chosen may not fit. Lower it, or set it to auto."
        )


def _longest_held_out(batches: Batching, spec: TrainSpec) -> list[tuple[int, ...]]:
    """Lengths of the largest batch whose loss is measured during training; empty where none is."""
    if spec.eval_strategy == "no":
        return []
    longest = longest_of(batches.held_out, spec.per_device_eval_batch_size)
    return batches.attended(longest) if longest else []


def _situation(
    model: PeftModel,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    longest: Sequence[Item],
    key: str | None,
) -> Situation:
    device = around.hardware.device
    standing = _taken_bytes(device) + bytes_of_update(model, spec.optim)
    kept = known_or_counted(model, batches, around, key)
    is_able = model.get_base_model().supports_gradient_checkpointing
    counts = counts_of_recomputing(spec.gradient_checkpointing, is_able, len(kept.layers))
    entries = model.config.get_text_config().vocab_size
    return Situation(kept, batches.attended(longest), standing, device, counts, entries)


def _fastest(situation: Situation, spec: TrainSpec, at_a_time: int | None) -> Way:
    """Raises HardwareError where nothing fits."""
    assert spec.memory_budget_bytes is not None
    way = situation.fastest(spec.memory_budget_bytes, at_a_time)
    if way is None:
        raise situation.nothing_fits(spec.memory_budget)
    return way


def _taken_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    return resident_bytes()


def _tell(reporter: Reporter, spec: TrainSpec, situation: Situation, way: Way, stays: Room) -> None:
    peak = situation.peak_bytes(way) / _MIB
    reporter.say(
        f"budget    {spec.memory_budget}: {situation.told(way)}, the fastest that fits; "
        f"{peak:,.0f} MiB at most, of which {situation.standing_bytes / _MIB:,.0f} MiB whatever is "
        f"chosen" + f"; of the rest {stays.told()}" * bool(stays.num_bytes)
    )
