"""The gated MLP, down(act(gate(x)) · up(x)), without keeping what comes between gate and down.

Of the four wide tensors of an MLP two are kept, gate(x) and up(x); act(gate(x)) and the product
are made again in the backward pass by the same operations, so that all numbers are the same bits.
Shazeer 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.remade import Origins, autocast_as_now

Activation = Callable[[torch.Tensor], torch.Tensor]
_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedOps:
    """By torch's own operations, with an activation of any kind."""

    def product(self, gate: torch.Tensor, up: torch.Tensor, act: Activation) -> torch.Tensor:
        """act(gate) · up, where it can be in the memory of act(gate)."""
        return _multiplied(act(gate), up, gate)

    def gradients(
        self, given: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: Activation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of gate and of up, which nobody needs afterwards."""
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = act(leaf)
        (of_gate,) = torch.autograd.grad(activated, leaf, given * up)
        return of_gate, _multiplied(activated.detach(), given, gate)


def _multiplied(activated: torch.Tensor, factor: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """In the memory of act(gate), unless an activation has left it where gate is."""
    # Storages by themselves: a trial on tensors without numbers has no addresses.
    is_own = activated.untyped_storage()._cdata != gate.untyped_storage()._cdata
    return activated.mul_(factor) if is_own else activated * factor


BY_TORCH = GatedOps()


class Gated(torch.autograd.Function):
    """act(gate) · up."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Activation, ops: GatedOps
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.ops = act, ops
        ctx.autocast = autocast_as_now(gate.device.type)
        return ops.product(gate, up, act)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with ctx.autocast():
            return *ctx.ops.gradients(gradients[0], *ctx.saved_tensors, ctx.act), None, None


class GatedForward:
    """The forward pass of one MLP."""

    def __init__(self, module: Any, origins: Origins, ops: GatedOps = BY_TORCH):
        self.module = module
        self.origins = origins
        self.ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        y: torch.Tensor
        if not (torch.is_grad_enabled() and gate.requires_grad and up.requires_grad):
            y = module.down_proj(self._made(gate, up))
            return y
        inner = Gated.apply(gate, up, module.act_fn, self.ops)
        self.origins.note(inner, self._made, gate, up)
        y = module.down_proj(inner)
        return y

    def _made(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.ops.product(gate, up, self.module.act_fn)


def looks_gated(module: nn.Module) -> bool:
    """Three linear layers and an activation without weights, and nothing else."""
    children = dict(module.named_children())
    return (
        children.keys() == _CHILDREN
        and not list(module.parameters(recurse=False))
        and not list(children["act_fn"].parameters())
    )


def is_gated(module: Any, x: torch.Tensor) -> bool:
    """Whether its own forward pass gives the same numbers, also in training."""
    was_training = module.training
    module.train()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        wanted = module.forward(x)
        torch.manual_seed(0)
        gate, up = module.gate_proj(x), module.up_proj(x)
        found = module.down_proj(module.act_fn(gate) * up)
    module.train(was_training)
    return gate.dtype == up.dtype and torch.equal(wanted, found)
