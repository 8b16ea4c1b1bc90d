"""LayerNorm that keeps its input and two numbers a token; what it makes can be made again.

Ba et al. 2016, https://arxiv.org/abs/1607.06450.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.remade import Origins


def _computed(
    x: torch.Tensor, module: Any, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, as x or of another dtype; mean; reciprocal deviation)"""
    given = (x, module.weight, module.bias)
    x, weight, bias = (one if one is None or dtype is None else one.to(dtype) for one in given)
    return torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any, dtype: torch.dtype | None) -> torch.Tensor:
        y, mean, reciprocal = _computed(x, module, dtype)
        ctx.save_for_backward(x, mean, reciprocal)
        ctx.module, ctx.dtype = module, dtype
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, mean, reciprocal = ctx.saved_tensors
        module, dtype = ctx.module, ctx.dtype or x.dtype
        vectors = (
            one if one is None or ctx.dtype is None else one.to(dtype)
            for one in (module.weight, module.bias)
        )
        of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradients[0],
            x.to(dtype),
            module.normalized_shape,
            mean,
            reciprocal,
            *vectors,
            [True, False, False],
        )
        return of_x.to(x.dtype), None, None


def _of_autocast(device: str) -> torch.dtype | None:
    """What autocast has torch's own computed in; None: as it is given, also on a CPU."""
    is_wider = device != "cpu" and torch.is_autocast_enabled(device)
    return torch.float32 if is_wider else None


class LayerNormForward:
    """The forward pass of one norm."""

    def __init__(self, module: nn.LayerNorm, origins: Origins):
        self.module = module
        self.origins = origins

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dtype = _of_autocast(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            y: torch.Tensor = _LayerNorm.apply(x, self.module, dtype)
            self.origins.note(y, partial(self._made, dtype), x)
        return y

    def _made(self, dtype: torch.dtype | None, x: torch.Tensor) -> torch.Tensor:
        return _computed(x, self.module, dtype)[0]


def is_layer_norm(module: nn.Module) -> bool:
    """torch's own, frozen."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and not any(one.requires_grad for one in module.parameters())
    )


def is_same(module: Any, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether x comes to the same bits here as its own forward pass has made of it."""
    with torch.no_grad():
        found = LayerNormForward(module, Origins())(x)
    return found.dtype == y.dtype and torch.equal(found, y)
