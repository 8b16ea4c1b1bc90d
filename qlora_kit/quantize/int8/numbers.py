"""The arithmetic: symmetric 8-bit integers, w ≈ s · q with q in -127 … 127.

Symmetric means that zero stays zero and that a product of two such numbers is s_w s_x · q_w q_x,
without the correction terms of a zero point (Jacob et al. 2018, https://arxiv.org/abs/1712.05877).
-128 is left out so that the range is the same on both sides.

Letters: O rows of a weight (outputs), I columns (inputs), G groups of columns, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

Granularity = Literal["tensor", "channel", "group"]
LARGEST = 127

# So many products of two such integers sum up exactly in float32: 127 · 127 · 1024 < 2^24.
_EXACT_COLUMNS = 1024


def weight_scales(weight: torch.Tensor, granularity: Granularity, group_size: int) -> torch.Tensor:
    """Scales such that the largest weight they cover is 127: (1, 1), (O, 1) or (O, G), float32.

    weight: (O, I). With "group", `group_size` columns of a row share one; it divides I.
    """
    size = weight.float().abs()
    if granularity == "tensor":
        largest = size.amax().view(1, 1)
    elif granularity == "channel":
        largest = size.amax(dim=1, keepdim=True)
    else:
        largest = size.view(len(weight), -1, group_size).amax(dim=2)
    return scale_of(largest)


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """The scale with which `largest` becomes 127; 1 where there is nothing but zeros."""
    scale = largest.float() / LARGEST
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def to_integers(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(values / scale) as int8, halves to the even neighbour, the rest cut off at ±127."""
    return (values.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def quantize_weight(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """weight: (O, I); scales: as `weight_scales` gives them. Returns int8 of shape (O, I)."""
    return to_integers(_grouped(weight, scales), scales.unsqueeze(-1)).view(weight.shape)


def dequantize_weight(integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Back to float32 of shape (O, I)."""
    return (_grouped(integers, scales).float() * scales.unsqueeze(-1)).view(integers.shape)


def token_scales(inputs: torch.Tensor) -> torch.Tensor:
    """One scale for each token, of its largest feature: (…, I) → (…, 1)."""
    return scale_of(inputs.float().abs().amax(dim=-1, keepdim=True))


def integer_product(
    inputs: torch.Tensor, input_scales: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """x · Wᵀ of integers: sums over whole numbers, which are exact, then times both scales.

    inputs: int8 (T, I); input_scales: (T, 1) or (); weight: int8 (O, I); scales: (1, 1), (O, 1) or
    (O, G). Returns float32 (T, O).
    """
    groups = scales.shape[1]
    columns = weight.shape[1] // groups
    total = torch.zeros(len(inputs), len(weight), dtype=torch.float32, device=inputs.device)
    for group in range(groups):
        part = slice(group * columns, (group + 1) * columns)
        total += _whole_number_product(inputs[:, part], weight[:, part]) * scales[:, group]
    return total * input_scales


def _whole_number_product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · Wᵀ in int32, by float32 products of few enough columns to be exact on any device.

    torch has no int8 product that all devices know and that is fast without special instructions.
    """
    total = torch.zeros(len(inputs), len(weight), dtype=torch.int32, device=inputs.device)
    for start in range(0, weight.shape[1], _EXACT_COLUMNS):
        part = slice(start, start + _EXACT_COLUMNS)
        total += (inputs[:, part].float() @ weight[:, part].float().T).to(torch.int32)
    return total


def _grouped(matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(O, I) → (O, G, I / G)."""
    return matrix.reshape(len(matrix), scales.shape[1], -1)
