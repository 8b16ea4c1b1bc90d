"""A linear module's weight as numbers, however it is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight in float32, shape (out, in) for bitsandbytes layers, as stored otherwise.

    4-bit weights are dequantized in float32 whatever dtype they compute in: rounding them to
    bf16 first costs more than the merge itself.
    """
    import bitsandbytes.functional as bnb

    owner: Any = module
    weight = owner.weight
    kind = type(weight).__name__
    dense: torch.Tensor
    if kind == "Params4bit":
        state = weight.quant_state
        dtype, state.dtype = state.dtype, torch.float32
        try:
            dense = bnb.dequantize_4bit(weight.data, state)
        finally:
            state.dtype = dtype
        return dense
    if kind == "Int8Params":
        scale = owner.state.SCB if owner.state.SCB is not None else weight.SCB
        dense = weight.data.float() * (scale.float().view(-1, 1) / 127.0)
        return dense
    dense = weight.detach().float()
    return dense
