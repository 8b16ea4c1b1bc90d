"""RMSNorm as one operation: of its input x and the reciprocal deviation r nothing else is kept.

y = w · x r with r = (mean x² + ε)^-½; with g the gradient of y, and n = x r,

    ∂x = r (w g − n mean(w g n))

Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.remade import Origins


@dataclass(frozen=True)
class NormKind:
    """What families do differently."""

    offset: float
    """Added to the weight: Gemma's is stored without its 1."""
    scales_last: bool
    """Whether the weight is applied in the input's dtype, after the cast back to it."""

    def scaled(
        self, x: torch.Tensor, reciprocal: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """y, of an x of any dtype and a float32 r (…, 1)."""
        normed = x.to(torch.float32) * reciprocal
        if not self.scales_last:
            return normed.mul_(self._factor(weight)).to(x.dtype)
        rounded = normed.to(x.dtype)
        is_wider = torch.result_type(weight, rounded) != rounded.dtype
        return weight * rounded if is_wider else rounded.mul_(weight)

    def gradient_of_normed(self, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """w g, in float32."""
        if self.scales_last:
            return (given * weight).to(torch.float32)
        return given.to(torch.float32) * self._factor(weight)

    def _factor(self, weight: torch.Tensor) -> torch.Tensor:
        factor = weight.to(torch.float32)
        return self.offset + factor if self.offset else factor


KINDS = (
    NormKind(0.0, scales_last=True),  # Llama, Qwen, Mistral, Phi
    NormKind(1.0, scales_last=False),  # Gemma
    NormKind(0.0, scales_last=False),  # OLMo 2
)


class NormOps:
    """By torch's own operations."""

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(y, as x; the reciprocal deviation, float32, (…, 1))"""
        reciprocal = _reciprocal(x, eps)
        return kind.scaled(x, reciprocal, weight), reciprocal

    def again(
        self, x: torch.Tensor, reciprocal: torch.Tensor, weight: torch.Tensor, kind: NormKind
    ) -> torch.Tensor:
        """y once more, to the bit."""
        return kind.scaled(x, reciprocal, weight)

    def gradient(
        self,
        given: torch.Tensor,
        x: torch.Tensor,
        reciprocal: torch.Tensor,
        weight: torch.Tensor,
        kind: NormKind,
    ) -> torch.Tensor:
        """Of x, where `given` is that of y."""
        scaled = kind.gradient_of_normed(given, weight)
        normed = x.to(torch.float32) * reciprocal
        along = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed.mul_(along)).mul_(reciprocal).to(x.dtype)


BY_TORCH = NormOps()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind, ops: NormOps
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, reciprocal = ops.forward(x, weight, eps, kind)
        ctx.save_for_backward(x, reciprocal, weight)
        ctx.kind, ctx.ops = kind, ops
        ctx.mark_non_differentiable(reciprocal)
        return y, reciprocal

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, reciprocal, weight = ctx.saved_tensors
        of_x = ctx.ops.gradient(gradients[0], x, reciprocal, weight, ctx.kind)
        return of_x, None, None, None, None


def _reciprocal(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)


class NormForward:
    """The forward pass of one norm."""

    def __init__(
        self, module: nn.Module, kind: NormKind, origins: Origins, ops: NormOps = BY_TORCH
    ):
        self.module = module
        self.kind = kind
        self.eps = _eps(module)
        self.origins = origins
        self.ops = ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y, reciprocal = _RmsNorm.apply(x, self.module.weight, self.eps, self.kind, self.ops)
            self.origins.note(y, self._made, x, reciprocal)
        result: torch.Tensor = y
        return result

    def _made(self, x: torch.Tensor, reciprocal: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.module.weight, torch.Tensor)
        return self.ops.again(x, reciprocal, self.module.weight.detach(), self.kind)


def looks_like_norm(module: nn.Module) -> bool:
    """One frozen vector and an epsilon, and nothing else."""
    own = dict(module.named_parameters())
    weight = own.get("weight")
    return (
        own.keys() == {"weight"}
        and not list(module.children())
        and weight is not None
        and weight.ndim == 1
        and not weight.requires_grad
        and isinstance(_eps(module), float)
    )


def kind_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> NormKind | None:
    """The kind that gives the same bits for x as its own forward pass did; None: of no known."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if x.shape[-1] != len(weight):
        return None
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        reciprocal = _reciprocal(x, _eps(module))
        for kind in KINDS:
            found = kind.scaled(x, reciprocal, weight)
            if found.dtype == y.dtype and torch.equal(found, y):
                return kind
    return None


def _eps(module: Any) -> Any:
    """Under either of its names; None where there is none."""
    known = vars(module)
    return known.get("variance_epsilon", known.get("eps"))
