"""What a forward pass keeps for the backward pass, by layer, and how it grows with the tokens.

It is counted on short sequences, storage by storage, on real tensors or on such without numbers.
It grows with the length of what attention sees together (with its square where attention keeps its
scores), so three lengths tell it for every other one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.memory.live import LiveTensors
from qlora_kit.memory.weights import hold_weights
from qlora_kit.model.qat.attach import fake_quantization_of

LENGTHS = (16, 32, 64)
"""Tokens of the sequences that are counted."""


@dataclass(frozen=True)
class Growth:
    """Bytes for one sequence of n tokens: constant + linear · n + square · n²."""

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, lengths: Sequence[int], bytes_: Sequence[int]) -> Growth:
        """The one parabola through three points."""
        (x0, x1, x2), (y0, y1, y2) = lengths, bytes_
        first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        square = (second - first) / (x2 - x0)
        linear = first - square * (x0 + x1)
        return cls(y0 - linear * x0 - square * x0**2, linear, square)

    def at(self, num_tokens: int) -> float:
        return self.constant + self.linear * num_tokens + self.square * num_tokens**2

    def over(self, lengths: Sequence[int]) -> float:
        """Of several sequences together."""
        return sum(map(self.at, lengths))


@dataclass(frozen=True)
class Kept:
    """What the forward pass of one sequence keeps for the backward pass."""

    layers: tuple[Growth, ...]
    """Of each layer, in order, its input included where it is kept."""
    inputs: Growth
    """Of the input of one layer, which is kept where the layer recomputes."""
    rest: Growth
    """Of what stands before and behind the layers."""
    passing: Growth = Growth(0.0, 0.0, 0.0)
    """Of what is made and let go again where nothing recomputes; see `holes_left_by`."""

    def peak_bytes(self, num_recomputing: int, lengths: Sequence[int]) -> float:
        """The most that is kept at once where the first layers recompute.

        Args:
            lengths: tokens of each sequence, as far as attention sees it together: with padding,
                and where a mask hides examples from each other, of the whole row.
        """
        of_layers = [one.over(lengths) for one in self.layers]
        inputs = num_recomputing * self.inputs.over(lengths)
        at_the_end = inputs + sum(of_layers[num_recomputing:])
        under_way = inputs + max(of_layers[:num_recomputing], default=0.0)
        return max(at_the_end, under_way) + self.rest.over(lengths)

    def offloaded_bytes(self, lengths: Sequence[int]) -> float:
        """The same where all of it waits elsewhere, but for one layer's and the rest."""
        return max(one.over(lengths) for one in self.layers) + self.rest.over(lengths)

    def working_bytes(self, lengths: Sequence[int]) -> float:
        """What the backward pass of one layer, or of what is behind them, takes beside what is
        kept, at most: as much as that has kept.
        """
        return max(one.over(lengths) for one in (*self.layers, self.rest))

    def fewest(self, lengths: Sequence[int], free_bytes: float) -> int:
        """How many layers have to recompute, so that the rest fits; all where nothing does."""
        for count in range(len(self.layers)):
            if self.peak_bytes(count, lengths) <= free_bytes:
                return count
        return len(self.layers)


def recomputing_layers(model: nn.Module) -> list[Any]:
    """The layers that can recompute, in the order in which they come."""
    return [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def measure_kept(
    model: nn.Module,
    run: Callable[[int], torch.Tensor],
    of_all: OfAll = list,
) -> Kept:
    """Count what training passes keep.

    Args:
        run: passes one sequence of so many tokens through the model, and returns the loss.
        of_all: makes of what is known of each layer of the model that of each layer there is to be,
            where a few stand for all.
    """
    if fake_quantization_of(model) is not None:
        with torch.no_grad():  # what it quantizes stays, and is no part of what passes keep
            run(LENGTHS[0])
    layers = recomputing_layers(model)
    counts = [_count(model, layers, partial(run, length), of_all) for length in LENGTHS]
    by_layer = zip(*(one.layers for one in counts), strict=True)
    return Kept(
        tuple(Growth.through(LENGTHS, sizes) for sizes in by_layer),
        Growth.through(LENGTHS, [one.inputs for one in counts]),
        Growth.through(LENGTHS, [one.rest for one in counts]),
        Growth.through(LENGTHS, [one.passing for one in counts]),
    )


OfAll = Callable[[Sequence["_OfLayer"]], Sequence["_OfLayer"]]


@dataclass(frozen=True)
class _OfLayer:
    kept: int
    passing: int


@dataclass(frozen=True)
class _Counted:
    layers: tuple[int, ...]
    inputs: int
    rest: int
    passing: int


def _count(
    model: nn.Module, layers: Sequence[Any], run: Callable[[], torch.Tensor], of_all: OfAll
) -> _Counted:
    """Bytes that are there after the pass and were not before."""
    live = LiveTensors()
    hold_weights(model, live)
    before = live.num_bytes
    passed = [_Passed() for _ in layers]
    handles = []
    for layer, one in zip(layers, passed, strict=True):
        entering, leaving = partial(one.entering, live), partial(one.leaving, live)
        handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(layer.register_forward_hook(leaving))
    try:
        with torch.enable_grad(), live:
            loss = run()
            found = [_OfLayer(one.bytes_kept(), one.passing) for one in passed]
            total, passing = live.num_bytes - before, live.gone_bytes
            del loss
    finally:
        for handle in handles:
            handle.remove()
    inputs = max((one.given_bytes for one in passed), default=0)
    whole = of_all(found)
    return _Counted(
        tuple(one.kept for one in whole),
        inputs,
        total - sum(one.kept for one in found),
        passing + sum(one.passing for one in whole) - sum(one.passing for one in found),
    )


@dataclass
class _Passed:
    """One layer while a forward pass goes through it."""

    given: weakref.ref[torch.UntypedStorage] | None = None
    given_bytes: int = 0
    before: int = 0
    added: int = 0
    """Beside what it hands on."""
    gone_before: int = 0
    passing: int = 0
    """Made and let go again."""

    def entering(
        self,
        live: LiveTensors,
        _: nn.Module,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        given = _first_tensor((*arguments, *options.values())).untyped_storage()
        self.given, self.given_bytes = weakref.ref(given), given.nbytes()
        self.before, self.gone_before = live.num_bytes, live.gone_bytes

    def leaving(self, live: LiveTensors, _: nn.Module, arguments: Any, output: Any) -> None:
        handed_on = _first_tensor(output if isinstance(output, tuple) else (output,))
        self.added = live.num_bytes - self.before - handed_on.untyped_storage().nbytes()
        self.passing = live.gone_bytes - self.gone_before

    def bytes_kept(self) -> int:
        """With its input, where that is there yet."""
        is_there = self.given is not None and self.given() is not None
        return self.added + (self.given_bytes if is_there else 0)


def _first_tensor(values: Iterable[Any]) -> torch.Tensor:
    return next(one for one in values if isinstance(one, torch.Tensor))
