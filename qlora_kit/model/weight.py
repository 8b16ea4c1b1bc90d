"""A linear module's weight as numbers, however it is kept."""

from __future__ import annotations

import torch
from torch import nn


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight in float32, shape (out, in) for bitsandbytes layers, as stored otherwise.

    4-bit weights are dequantized in float32 whatever dtype they compute in: rounding them to
    bf16 first costs more than the merge itself.
    """
    import bitsandbytes.functional as bnb

    weight = module.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        state = weight.quant_state
        dtype, state.dtype = state.dtype, torch.float32
        try:
            return bnb.dequantize_4bit(weight.data, state)
        finally:
            state.dtype = dtype
    if kind == "Int8Params":
        scale = module.state.SCB if module.state.SCB is not None else weight.SCB
        return weight.data.float() * (scale.float().view(-1, 1) / 127.0)
    assert isinstance(weight, torch.Tensor)
    return weight.detach().float()
