"""Attention of short examples on a CPU in bfloat16, whose backward pass is taken in float32.

torch's kernel for it (FlashAttention, forward and backward) takes longer backward in bfloat16 than
in float32 up to a few hundred tokens, eight times as long for 40; its forward pass is faster.
Forward the same bits; gradients nearer to the exact ones. Dao et al. 2022,
https://arxiv.org/abs/2205.14135.
"""

from __future__ import annotations

from typing import Any

import torch

# Tokens of the longest example that gains by it, and the widest head that was tried.
_LONGEST, _WIDEST = 256, 256
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class _Attention(torch.autograd.Function):
    """Of q (B, heads, S, D), k and v (B, heads of them, S, D), causal or not."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        out, log_sums = getattr(torch.ops.aten, _FORWARD)(q, k, v, 0.0, is_causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.is_causal, ctx.scale = is_causal, scale
        made: torch.Tensor = out
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, log_sums = ctx.saved_tensors
        wide = [one.float() for one in (gradients[0], *kept)]
        how = (0.0, ctx.is_causal)
        found = getattr(torch.ops.aten, _BACKWARD)(*wide, log_sums, *how, scale=ctx.scale)
        return *(one.to(kept[0].dtype) for one in found), None, None


def covers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are short, computed in bfloat16 on a CPU, and the kernel takes them."""
    return (
        query.device.type == "cpu"
        and dtype_of_products(query) == torch.bfloat16
        and 1 < query.shape[2] == key.shape[2] <= _LONGEST
        and query.shape[3] == key.shape[3] == value.shape[3] <= _WIDEST
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and hasattr(torch.ops.aten, _FORWARD)
        and hasattr(torch.ops.aten, _BACKWARD)
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """(B, heads, S, D) to (B, S, heads, D), where `covers` says so."""
    dtype = dtype_of_products(query)
    out: torch.Tensor = _Attention.apply(
        *(one.to(dtype) for one in (query, key, value)), is_causal, scale
    )
    return out.transpose(1, 2).contiguous()


def dtype_of_products(query: torch.Tensor) -> torch.dtype:
    """What autocast, which does not know these operations by themselves, would compute in."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype
