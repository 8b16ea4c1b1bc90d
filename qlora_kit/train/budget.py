"""The fastest way to train within a budget of memory: train.memory_budget.

What may be traded: how many sequences are taken at a time, how many layers recompute, whether
activations wait in the host's memory (GPUs alone), and whether unpacked weights stay. None changes
what an update trains on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from qlora_kit.errors import HardwareError
from qlora_kit.train.fitting import divisor_of, sequences_before
from qlora_kit.train.recompute import (
    Kept,
    Recompute,
    choose_recompute,
    loss_of_length,
    measure_kept,
    recomputing_layers,
)
from qlora_kit.train.supervised_loss import chunk_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.model.fused.residents import Residents
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.report.reporter import Reporter
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.snapshot import Progress
    from qlora_kit.train.surroundings import Surroundings

_MIB = 2**20
# What a count of tensors does not see of what is allocated.
_MARGIN = 1.1
_ALLOCATOR_BYTES = 32 * _MIB
# Tokens that a pass costs beside its own: weights are unpacked, and kernels are filled badly.
_TOKENS_OF_A_PASS = {"cpu": 32, "cuda": 1024}
_OFFLOAD_FACTOR = 2.0


@dataclass(frozen=True)
class Way:
    """One way to train."""

    at_a_time: int
    """Sequences."""
    num_recomputing: int
    offloads: bool = False


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    kept: Kept
    num_sequences: int
    """Of the largest micro-batch."""
    num_tokens: int
    """Of its longest sequence."""
    standing_bytes: float
    """Taken before the first update, and by it beside activations."""
    device: str
    counts: Sequence[int]
    """Of layers that may recompute."""

    def ways(self) -> Iterator[Way]:
        size, sizes = self.num_sequences, []
        while size > 1:
            sizes.append(size)
            size = -(-size // 2)
        for at_a_time in (*sizes, 1):
            for count in self.counts:
                yield Way(at_a_time, count)
                if self.device == "cuda" and count and count == len(self.kept.layers):
                    yield Way(at_a_time, count, offloads=True)

    def peak_bytes(self, way: Way) -> float:
        """Of the process, or of what is allocated on a GPU."""
        if way.offloads:
            layer = max(one.at(self.num_tokens) for one in self.kept.layers)
            of_one = layer + self.kept.rest.at(self.num_tokens)
            return self.standing_bytes + _MARGIN * way.at_a_time * of_one
        shape = (way.num_recomputing, way.at_a_time, self.num_tokens)
        return self.standing_bytes + _MARGIN * self.kept.peak_bytes(*shape)

    def cost(self, way: Way) -> float:
        """Time of a micro-batch, in tokens of one product with all weights."""
        passes = -(-self.num_sequences // way.at_a_time)
        tokens = self.num_sequences * self.num_tokens + passes * _TOKENS_OF_A_PASS[self.device]
        again = way.num_recomputing / max(len(self.kept.layers), 1)
        return tokens * (2 + again) * (_OFFLOAD_FACTOR if way.offloads else 1)

    def fastest(self, budget_bytes: float, at_a_time: int | None = None) -> Way | None:
        """None where nothing fits.

        Args:
            at_a_time: sequences, to be kept to where that fits.
        """
        fitting = [way for way in self.ways() if self.peak_bytes(way) <= budget_bytes]
        wanted = [way for way in fitting if way.at_a_time == at_a_time]
        return min(wanted or fitting, key=self.cost, default=None)

    def leanest(self) -> Way:
        return min(self.ways(), key=self.peak_bytes)


@dataclass(frozen=True)
class Fit:
    """How training is made to fit."""

    recompute: Recompute
    divisor: int = 1
    """Parts that a micro-batch is divided into."""
    offloads: bool = False

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
) -> Fit:
    """As fast as the budget allows, on all processes as on the one that has the least room;
    without a budget, as `choose_recompute` says.

    Args:
        residents: is given what is left of the budget.
        before: of a run that goes on; it keeps to as many sequences at a time, if that fits:
            another number would round otherwise.

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
        return Fit(choose_recompute(model, batches, spec, around, is_sharded))
    num_tokens = max(item.num_tokens for item in longest)
    wanted = sequences_before(before, spec)
    processes = around.processes
    situation = processes.together(lambda: _situation(model, batches, spec, around, num_tokens))
    way = processes.together(lambda: _fastest(situation, spec, wanted))
    fewest = min(processes.gathered(way.at_a_time))
    if fewest < way.at_a_time:
        way = _fastest(situation, spec, fewest)
    if around.hardware.device == "cpu":
        residents.room_bytes = int(spec.memory_budget_bytes - situation.peak_bytes(way))
    _tell(around.reporter, spec, situation, way, residents.room_bytes)
    return Fit(
        Recompute(model, way.num_recomputing, len(situation.kept.layers), residents=residents),
        divisor_of(spec.per_device_train_batch_size, way.at_a_time),
        way.offloads,
    )


def _situation(
    model: PeftModel,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    num_tokens: int,
) -> Situation:
    device = around.hardware.device
    standing = _taken_bytes(device) + _bytes_of_update(model, device)
    kept = measure_kept(model, lambda n: loss_of_length(model, batches.collator, n, around))
    counts = _counts(model, spec)
    return Situation(kept, spec.per_device_train_batch_size, num_tokens, standing, device, counts)


def _fastest(situation: Situation, spec: TrainSpec, at_a_time: int | None) -> Way:
    """Raises HardwareError where nothing fits."""
    assert spec.memory_budget_bytes is not None
    way = situation.fastest(spec.memory_budget_bytes, at_a_time)
    if way is None:
        raise _nothing_fits(situation, spec)
    return way


def _nothing_fits(situation: Situation, spec: TrainSpec) -> HardwareError:
    leanest = situation.leanest()
    smallest = math.ceil(situation.peak_bytes(leanest) / _MIB)
    return HardwareError(
        f"nothing fits train.memory_budget ({spec.memory_budget}). The smallest that would: "
        f"{smallest}MiB, with {_told(leanest, situation)}; of that "
        f"{situation.standing_bytes / _MIB:,.0f} MiB are taken before the first sequence. Raise "
        "it, or lower data.max_length."
    )


def _counts(model: PeftModel, spec: TrainSpec) -> Sequence[int]:
    num_layers = len(recomputing_layers(model))
    if not model.get_base_model().supports_gradient_checkpointing:
        return (0,)
    if spec.gradient_checkpointing == "auto":
        return range(num_layers + 1)
    return (num_layers if spec.gradient_checkpointing else 0,)


def _taken_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _bytes_of_update(model: PeftModel, device: str) -> int:
    """Gradients and the optimizer's state, at most; logits of one chunk with their gradients, the
    largest weight unpacked, and as much again where it is cast.
    """
    trained: int = sum(one.numel() for one in model.parameters() if one.requires_grad)
    linear = (one for one in model.modules() if isinstance(one, nn.Linear))
    largest: int = max((one.in_features * one.out_features for one in linear), default=0)
    return 12 * trained + 3 * chunk_bytes(device) + 2 * 4 * largest + _ALLOCATOR_BYTES


def _tell(
    reporter: Reporter, spec: TrainSpec, situation: Situation, way: Way, room_bytes: int
) -> None:
    peak = situation.peak_bytes(way) / _MIB
    held = f"; unpacked weights stay in {room_bytes / _MIB:,.0f} MiB of the rest"
    reporter.say(
        f"budget    {spec.memory_budget}: {_told(way, situation)}, the fastest that fits; "
        f"{peak:,.0f} MiB at most, of which {situation.standing_bytes / _MIB:,.0f} MiB whatever is "
        f"chosen" + held * (room_bytes > 0)
    )


def _told(way: Way, situation: Situation) -> str:
    num_layers = len(situation.kept.layers)
    parts = [
        f"{way.at_a_time} of {situation.num_sequences} sequences of up to "
        f"{situation.num_tokens:,} tokens at a time",
        f"{way.num_recomputing} of {num_layers} layers recomputing",
    ]
    if way.offloads:
        parts.append("activations waiting in the host's memory")
    return ", ".join(parts)
