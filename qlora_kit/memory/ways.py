"""Ways to train that take more or less memory, and which of them is taken: the one place where a
run decides, and where a plan learns what a run would decide.

What may be traded: how many sequences are taken at a time, how many layers recompute, and whether
activations wait in the host's memory (GPUs alone). None changes what an update trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import HardwareError
from qlora_kit.memory.allocator import holes_left_by
from qlora_kit.memory.kept import Kept
from qlora_kit.memory.optimizer import state_bytes
from qlora_kit.model.fused.linear import is_frozen_linear
from qlora_kit.model.fused.residents import NO_ROOM, Room
from qlora_kit.model.quantized import eight_bit_scale, is_four_bit
from qlora_kit.train.supervised_loss import chunk_bytes

if TYPE_CHECKING:
    from torch import nn

_MIB = 2**20
_FLOAT_BYTES = 4
# Of what is free, the part that `gradient_checkpointing: auto` gives to what is kept; the other is
# left to the allocator and to others on the machine.
_SHARE_OF_FREE = {"cpu": 0.6, "cuda": 0.85}
# What a count of tensors does not see of what an allocator takes.
_ALLOCATOR_BYTES = 32 * _MIB
_ALLOCATOR_SHARE = 0.03
# Tensors of a chunk's logits: these, their gradient, and one more where they are scaled or capped.
_LOGITS_AT_ONCE = 3
# Tokens that a pass costs beside its own: weights are unpacked, and kernels are filled badly.
_TOKENS_OF_A_PASS = {"cpu": 32, "cuda": 1024}
_OFFLOAD_FACTOR = 2.0

Lengths = Sequence[int]
"""Tokens of each sequence, as far as attention sees it together; see `Kept.peak_bytes`."""


@dataclass(frozen=True)
class Way:
    """One way to train."""

    at_a_time: int
    """Sequences."""
    num_recomputing: int
    offloads: bool = False

    def gives_up_speed(self, num_sequences: int) -> bool:
        """Beside the way that trains on so many at a time and recomputes nothing."""
        return self != Way(num_sequences, 0)


@dataclass(frozen=True)
class Situation:
    """What the choice depends on."""

    kept: Kept
    rows: Sequence[Lengths]
    """Of the largest micro-batch, the longest first."""
    standing_bytes: float
    """Taken before the first update, and by it beside activations."""
    device: str
    counts: Sequence[int]
    """Of layers that may recompute."""
    num_entries: int = 0
    """Of the vocabulary."""

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Of the longest sequence."""
        return sum(self.rows[0])

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
        lengths = lengths_of_rows(self.rows[: way.at_a_time])
        if way.offloads:
            kept = self.kept.offloaded_bytes(lengths)
        else:
            kept = self.kept.peak_bytes(way.num_recomputing, lengths)
        return self._with_standing(kept + self._at_work(lengths)) + self._holes_bytes(way)

    def held_out_bytes(self, rows: Sequence[Lengths]) -> float:
        """As `peak_bytes`, while the loss of these held-out rows is measured: nothing is kept."""
        return self._with_standing(self._at_work(lengths_of_rows(rows)))

    def most_held_out(self, rows: Sequence[Lengths], budget_bytes: float) -> int:
        """How many of these, the longest first, fit together: all, a half, a quarter, …, or one."""
        size = len(rows)
        while size > 1 and self.held_out_bytes(rows[:size]) > budget_bytes:
            size = -(-size // 2)
        return size

    def _with_standing(self, activation_bytes: float) -> float:
        return self.standing_bytes + (1 + _ALLOCATOR_SHARE) * activation_bytes

    def _at_work(self, lengths: Lengths) -> float:
        return max(
            self.kept.working_bytes(lengths),
            _logits_bytes(self.num_entries, sum(lengths), self.device),
        )

    def _holes_bytes(self, way: Way) -> int:
        """None where freed blocks go back at once."""
        if self.device != "cpu" or way.gives_up_speed(self.num_sequences):
            return 0
        return holes_left_by(int(self.kept.passing.over(lengths_of_rows(self.rows))))

    def cost(self, way: Way) -> float:
        """Time of a micro-batch, in tokens of one product with all weights."""
        passes = -(-self.num_sequences // way.at_a_time)
        tokens = sum(lengths_of_rows(self.rows)) + passes * _TOKENS_OF_A_PASS[self.device]
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

    def told(self, way: Way) -> str:
        """In a few words, for people."""
        parts = [
            f"{way.at_a_time} of {self.num_sequences} sequences of up to "
            f"{self.num_tokens:,} tokens at a time",
            f"{way.num_recomputing} of {len(self.kept.layers)} layers recomputing",
        ]
        if way.offloads:
            parts.append("activations waiting in the host's memory")
        return ", ".join(parts)

    def nothing_fits(self, budget: str) -> HardwareError:
        """What to say where no way fits a budget: the smallest that one would."""
        leanest = self.leanest()
        smallest = math.ceil(self.peak_bytes(leanest) / _MIB)
        return HardwareError(
            f"nothing fits train.memory_budget ({budget}). The smallest that would: "
            f"{smallest}MiB, with {self.told(leanest)}; of that "
            f"{self.standing_bytes / _MIB:,.0f} MiB are taken before the first sequence. Raise "
            "it, or lower data.max_length."
        )


def _logits_bytes(num_entries: int, num_tokens: int, device: str) -> int:
    """Of one chunk, with what is made of it on the way to its gradient."""
    all_of_them = _FLOAT_BYTES * num_entries * num_tokens
    return _LOGITS_AT_ONCE * min(chunk_bytes(num_entries, device), all_of_them)


def lengths_of_rows(rows: Sequence[Lengths]) -> list[int]:
    return [length for row in rows for length in row]


def counts_of_recomputing(asked: bool | str, is_able: bool, num_layers: int) -> Sequence[int]:
    """How many layers may recompute, by `gradient_checkpointing` and what the model can."""
    if not is_able:
        return (0,)
    if asked == "auto":
        return range(num_layers + 1)
    return (num_layers if asked else 0,)


def room_for_kept(
    free_bytes: float, update_bytes: float, num_entries: int, num_tokens: int, device: str
) -> float:
    """What `gradient_checkpointing: auto` lets activations take, of what is free.

    Args:
        num_entries: of the vocabulary.
        num_tokens: of the longest batch.
    """
    others = update_bytes + _logits_bytes(num_entries, num_tokens, device)
    return _SHARE_OF_FREE[device] * free_bytes - others


def room_for_unpacked(
    model: nn.Module,
    room_bytes: float,
    kept: Kept,
    num_recomputing: int,
    lengths: Lengths,
    device: str,
    reorders: Callable[[], bool],
) -> Room:
    """What activations leave of their room, where no layer recomputes, for unpacked weights that
    stay, and no more than all of these take; on a GPU none.
    """
    if device != "cpu" or num_recomputing:
        return NO_ROOM
    return room_for_residents(model, room_bytes - kept.peak_bytes(0, lengths), reorders)


def room_for_residents(model: nn.Module, left_bytes: float, reorders: Callable[[], bool]) -> Room:
    """Of what is left, as much as weights that stay can take: every frozen layer's in the layout
    of each direction where there is room for all of that; else quantized ones unpacked.

    Args:
        reorders: whether that layout is taken; it is asked only where there is room.
    """
    both = reordered_bytes(model)
    if 0 < both <= left_bytes - turned_bytes(model) and reorders():
        return Room(both, is_for_reordered=True)
    all_of_them = sum(map(unpacked_bytes, _four_bit_parameters(model)))
    return Room(max(min(int(left_bytes), all_of_them), 0))


def reordered_bytes(model: nn.Module) -> int:
    """Of every frozen layer in the layout of both directions."""
    layers: Iterator[Any] = (one for one in model.modules() if is_frozen_linear(one))
    return 2 * sum(unpacked_bytes(one.weight) for one in layers)


def turned_bytes(model: nn.Module) -> int:
    """What the first backward pass takes beyond those that follow it, where the head is most of the
    weights: it is turned round for its gradient when of no other layer that is there yet.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or not is_frozen_linear(head):
        return 0
    return max(2 * unpacked_bytes(head.weight) - reordered_bytes(model) // 2, 0)


def unpacked_bytes(weight: Any) -> int:
    """Of a weight in 4 bits, or as it is."""
    if not is_four_bit(weight):
        return int(weight.nbytes)
    state = weight.quant_state
    return int(state.shape.numel() * state.dtype.itemsize)


def bytes_of_update(model: nn.Module, optim: str) -> int:
    """What an update takes beside activations and logits: gradients, the optimizer's state, the
    largest quantized weight unpacked (and cast), and what an allocator keeps for itself.
    """
    trained = [one.numel() for one in model.parameters() if one.requires_grad]
    state = state_bytes(optim, trained)
    unpacked = 2 * _FLOAT_BYTES * largest_quantized(model)
    return _FLOAT_BYTES * sum(trained) + state + unpacked + _ALLOCATOR_BYTES


def largest_quantized(model: nn.Module) -> int:
    """Numbers of the largest weight that is in 4 or 8 bits; 0 where none is."""
    sizes = [one.quant_state.shape.numel() for one in _four_bit_parameters(model)]
    modules: Iterator[Any] = (one for one in model.modules() if eight_bit_scale(one) is not None)
    return max([*sizes, *(one.weight.numel() for one in modules)], default=0)


def _four_bit_parameters(model: nn.Module) -> Iterator[Any]:
    return (one for one in model.parameters() if is_four_bit(one))
