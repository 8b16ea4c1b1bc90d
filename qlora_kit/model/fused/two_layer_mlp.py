"""MLPs of two layers, second(act(first(x))), without keeping what comes between them.

Kept is what the first layer makes; the activation is made again in the backward pass by the same
operations, so that all numbers are the same bits. So are those whose first layer makes gate and up
in one (Phi-3, GLM-4), second(act(gate) · up); see `gated`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from qlora_kit.model.fused import gated
from qlora_kit.model.fused.remade import Origins, autocast_as_now

Activation = Callable[[torch.Tensor], torch.Tensor]


class _Between(Protocol):
    """What comes between the two layers."""

    def made(self, first: torch.Tensor, act: Activation) -> torch.Tensor:
        """What the second layer is given: in memory of its own."""

    def gradient(self, given: torch.Tensor, first: torch.Tensor, act: Activation) -> torch.Tensor:
        """Of what the first layer makes."""


class _Plain:
    """act(first)"""

    def made(self, first: torch.Tensor, act: Activation) -> torch.Tensor:
        return act(first)

    def gradient(self, given: torch.Tensor, first: torch.Tensor, act: Activation) -> torch.Tensor:
        with torch.enable_grad():
            leaf = first.detach().requires_grad_()
            activated = act(leaf)
        (found,) = torch.autograd.grad(activated, leaf, given)
        return found


class _Joined:
    """act(gate) · up, where first is (…, gate and up)."""

    def made(self, first: torch.Tensor, act: Activation) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        return gated.BY_TORCH.product(gate, up, act)

    def gradient(self, given: torch.Tensor, first: torch.Tensor, act: Activation) -> torch.Tensor:
        gate, up = first.chunk(2, dim=-1)
        return torch.cat(gated.BY_TORCH.gradients(given, gate, up, act), dim=-1)


_PLAIN, _JOINED = _Plain(), _Joined()


@dataclass(frozen=True)
class TwoLayers:
    """The children of such an MLP, by name."""

    first: str
    second: str
    act: str
    dropouts: tuple[str, ...]
    """Behind the second layer."""
    is_joined: bool
    """Whether the first layer makes gate and up."""

    @property
    def between(self) -> _Between:
        return _JOINED if self.is_joined else _PLAIN


def two_layers_of(module: nn.Module) -> TwoLayers | None:
    """Two linear layers of which the second takes what the first makes, or half of it, and an
    activation without weights, and nothing else but dropout; None: it does not look so.
    """
    if list(module.parameters(recurse=False)):
        return None
    children = dict(module.named_children())
    layers = [name for name, one in children.items() if list(one.parameters())]
    dropouts = tuple(name for name, one in children.items() if isinstance(one, nn.Dropout))
    others = [name for name in children if name not in layers and name not in dropouts]
    if len(layers) != 2 or len(others) != 1:
        return None
    first, second = layers
    made, taken = _widths(children[first])[1], _widths(children[second])[0]
    if not made or made not in (taken, 2 * taken):
        return None
    return TwoLayers(first, second, others[0], dropouts, is_joined=made != taken)


def _widths(layer: Any) -> tuple[int, int]:
    """Of its inputs and outputs; zeros where it does not say."""
    if hasattr(layer, "nx"):  # transformers' Conv1D
        return int(layer.nx), int(layer.nf)
    return int(getattr(layer, "in_features", 0)), int(getattr(layer, "out_features", 0))


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, between: _Between, act: Activation) -> torch.Tensor:
        ctx.save_for_backward(first)
        ctx.between, ctx.act = between, act
        ctx.autocast = autocast_as_now(first.device.type)
        return between.made(first, act)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (first,) = ctx.saved_tensors
        with ctx.autocast():
            return ctx.between.gradient(gradients[0], first, ctx.act), None, None


class TwoLayerForward:
    """The forward pass of one MLP."""

    def __init__(self, module: Any, layers: TwoLayers, origins: Origins):
        self.module = module
        self.layers = layers
        self.origins = origins

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module, layers = self.module, self.layers
        first = getattr(module, layers.first)(x)
        if torch.is_grad_enabled() and first.requires_grad:
            inner = _Inner.apply(first, layers.between, getattr(module, layers.act))
            self.origins.note(inner, self._made, first)
        else:
            inner = self._made(first)
        y: torch.Tensor = getattr(module, layers.second)(inner)
        for name in layers.dropouts:
            y = getattr(module, name)(y)
        return y

    def _made(self, first: torch.Tensor) -> torch.Tensor:
        return self.layers.between.made(first, getattr(self.module, self.layers.act))


def is_two_layers(module: Any, layers: TwoLayers, x: torch.Tensor) -> bool:
    """Whether its own forward pass gives the same numbers, also in training."""
    was_training = module.training
    module.train()
    ours = TwoLayerForward(module, layers, Origins())
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        wanted = module.forward(x)
        torch.manual_seed(0)
        found = ours(x)
        first = getattr(module, layers.first)(x)
        is_own = ours._made(first).untyped_storage()._cdata != first.untyped_storage()._cdata
    module.train(was_training)
    return is_own and isinstance(wanted, torch.Tensor) and torch.equal(wanted, found)
