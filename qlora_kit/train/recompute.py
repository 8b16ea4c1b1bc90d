"""Which layers recompute their activations in the backward pass: as few as the memory asks for.

What a forward pass keeps is counted, on short sequences, tensor by tensor; it grows with the
length of the sequence (with its square where attention keeps its scores), so three lengths tell it
for every other one. The first layers recompute: their turn in the backward pass comes when all
others have given their memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

if TYPE_CHECKING:
    from peft import PeftModel

_LENGTHS = (16, 32, 64)


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


@dataclass(frozen=True)
class Kept:
    """What the forward pass of one sequence keeps for the backward pass."""

    layers: tuple[Growth, ...]
    """Of each layer, in order, beside its input."""
    inputs: Growth
    """Of the input of one layer, which is kept where the layer recomputes."""
    rest: Growth
    """Of what stands before and behind the layers."""

    def peak_bytes(self, num_recomputing: int, num_sequences: int, num_tokens: int) -> float:
        """The most that is kept at once where the first layers recompute.

        Args:
            num_tokens: of the longest sequence, to which the others are padded.
        """
        of_layers = [one.at(num_tokens) for one in self.layers]
        inputs = num_recomputing * self.inputs.at(num_tokens)
        at_the_end = inputs + sum(of_layers[num_recomputing:])
        under_way = inputs + max(of_layers[:num_recomputing], default=0.0)
        most = max(at_the_end, under_way) + self.rest.at(num_tokens)
        return num_sequences * most

    def fewest(self, num_sequences: int, num_tokens: int, free_bytes: float) -> int:
        """How many layers have to recompute, so that the rest fits; all where nothing does."""
        for count in range(len(self.layers)):
            if self.peak_bytes(count, num_sequences, num_tokens) <= free_bytes:
                return count
        return len(self.layers)


def recomputing_layers(model: nn.Module) -> list[Any]:
    """The layers that can recompute, in the order in which they come."""
    return [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]


def recompute_first(model: nn.Module, count: int) -> None:
    """Let the first layers recompute, and no others."""
    for number, layer in enumerate(recomputing_layers(model)):
        layer.gradient_checkpointing = number < count


@contextmanager
def recomputing(model: PeftModel) -> Iterator[None]:
    """Prepare all layers to recompute; none does any more afterwards."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def measure_kept(model: nn.Module, run: Callable[[int], torch.Tensor]) -> Kept:
    """Count what training passes keep.

    Args:
        run: passes one sequence of so many tokens through the model, and returns the loss.
    """
    layers = recomputing_layers(model)
    counts = [_count(model, layers, lambda: run(length)) for length in _LENGTHS]
    by_layer = zip(*(one.layers for one in counts), strict=True)
    return Kept(
        tuple(Growth.through(_LENGTHS, sizes) for sizes in by_layer),
        Growth.through(_LENGTHS, [one.inputs for one in counts]),
        Growth.through(_LENGTHS, [one.rest for one in counts]),
    )


@dataclass(frozen=True)
class _Counted:
    layers: tuple[int, ...]
    inputs: int
    rest: int


def _count(model: nn.Module, layers: Sequence[Any], run: Callable[[], torch.Tensor]) -> _Counted:
    """Bytes of every storage that is kept, counted where it is met first."""
    owned = {_storage(one) for one in (*model.parameters(), *model.buffers())}
    seen: set[int] = set()
    alive: list[torch.Tensor] = []
    by_layer = [0] * len(layers)
    inputs = [0] * len(layers)
    rest = 0
    now: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal rest
        storage = _storage(tensor)
        if storage in owned or storage in seen:
            return tensor
        seen.add(storage)
        alive.append(tensor)
        size = tensor.untyped_storage().nbytes()
        if now:
            by_layer[now[-1]] += size
        else:
            rest += size
        return tensor

    def entering(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = next(
                one for one in (*arguments, *options.values()) if isinstance(one, torch.Tensor)
            )
            inputs[number] = given.untyped_storage().nbytes()
            storage = _storage(given)
            if storage not in seen:  # it belongs to this layer whoever saves it
                seen.add(storage)
                alive.append(given)
                by_layer[number] += inputs[number]
            now.append(number)

        return hook

    def leaving(*_: Any) -> None:
        now.pop()

    handles = [
        one.register_forward_pre_hook(entering(n), with_kwargs=True) for n, one in enumerate(layers)
    ]
    handles += [one.register_forward_hook(leaving) for one in layers]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return _Counted(tuple(by_layer), max(inputs, default=0), rest)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
