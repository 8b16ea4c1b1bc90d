"""Rotary embedding of queries and keys as one operation, x cos + rotated(x) sin, in halves.

    y₁ = x₁ cos₁ − x₂ sin₁      y₂ = x₂ cos₂ + x₁ sin₂

Su et al. 2021, https://arxiv.org/abs/2104.09864, in the order of dimensions that GPT-NeoX and Llama
have. transformers' code for it is a function in the file of each family, `apply_rotary_pos_emb`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

_NAME = "apply_rotary_pos_emb"
_TOLERANCE = 1e-5
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RotaryOps:
    """By torch's own operations."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of q and k (B, heads, S, D); cos and sin: (B or 1, S, D)."""
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    def gradients(
        self, of_q: torch.Tensor, of_k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what was given, where these are those of the results."""
        return _rotated_back(of_q, cos, sin), _rotated_back(of_k, cos, sin)


BY_TORCH = RotaryOps()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


def _rotated_back(given: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = given.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    of_x = given * cos
    of_x[..., :half].addcmul_(given[..., half:], sin[..., half:])
    of_x[..., half:].addcmul_(given[..., :half], sin[..., :half], value=-1)
    return of_x


class Rotary(torch.autograd.Function):
    """Of q and k together."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        ops: RotaryOps,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Wide norms make queries of a wider type than the cosines.
        if torch.promote_types(q.dtype, cos.dtype) == q.dtype:
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.ops = ops if q.dtype == cos.dtype else BY_TORCH
        ctx.dtype = q.dtype
        rotated: tuple[torch.Tensor, torch.Tensor] = ctx.ops.forward(q, k, cos, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_q, of_k = ctx.ops.gradients(*gradients, *ctx.saved_tensors)
        return of_q.to(ctx.dtype), of_k.to(ctx.dtype), None, None, None


class RotaryForward:
    """In place of a family's own function, which stays for what is otherwise."""

    def __init__(self, own: Rotate, ops: RotaryOps = BY_TORCH):
        self.own = own
        self.ops = ops

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *more: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if more or named or not is_usual(q, k, cos, sin):
            return self.own(q, k, cos, sin, *more, **named)
        made: tuple[torch.Tensor, torch.Tensor] = Rotary.apply(q, k, cos, sin, self.ops)
        return made


def is_usual(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether all of each head is rotated, and cos and sin are constants."""
    width = q.shape[-1]
    return (
        q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
        and k.shape[-1] == cos.shape[-1] == sin.shape[-1] == width
        and width % 2 == 0
        and q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
    )


def is_rotation(
    own: Rotate, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether a family's function computes this, which float32 shows."""
    if not is_usual(q, k, cos, sin):
        return False
    given = [one.detach().float() for one in (q, k, cos, sin)]
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        pairs = zip(BY_TORCH.forward(*given), own(*given), strict=True)
        return all(torch.allclose(one, other, _TOLERANCE, _TOLERANCE) for one, other in pairs)


def rotary_files(model: nn.Module) -> dict[str, ModuleType]:
    """The Python modules that a model's own modules are from and that rotate, by name."""
    names = {type(one).__module__ for one in model.modules()}
    files = {name: sys.modules[name] for name in sorted(names) if name in sys.modules}
    return {name: file for name, file in files.items() if callable(vars(file).get(_NAME))}


def rotates_in_halves(file: ModuleType) -> bool:
    """Whether this file's function computes this on a few numbers: others take other arguments
    (GPT-J), or rotate pairs of neighbours (Cohere, GLM).
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, heads, 3, 8), generator=generator) for heads in (2, 1))
    angles = torch.randn((1, 3, 4), generator=generator).repeat(1, 1, 2)
    try:
        return is_rotation(getattr(file, _NAME), q, k, angles.cos(), angles.sin())
    except Exception:  # whatever a function says of arguments that it does not know
        return False


@contextmanager
def replaced_rotary(file: ModuleType, make: Callable[[Rotate], Rotate]) -> Iterator[None]:
    """Another function in this file, made of its own, while the context lasts."""
    own = getattr(file, _NAME)
    setattr(file, _NAME, make(own))
    try:
        yield
    finally:
        setattr(file, _NAME, own)
