"""Blocks that begin in one row and end in the next, and whether bitsandbytes reads them right.

It quantizes a weight as one long row of numbers, cut into blocks. On processors with AVX-512 its
CPU code (0.50.2) reads the rows one by one as if each began a new block, so that where a row is no
whole number of blocks the scales are mixed up: with 576 inputs and blocks of 128 the error of a
weight is 0.22 instead of 0.095. Other processors and GPUs read the same file right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.recipe import QuantizationSpec

BLOCK_SIZE = 64
"""Of 4-bit weights, where nothing else is asked for."""
_NUM_ROWS = 64


def refuse_misread(
    skeleton: Skeleton, bits: Mapping[str, int], quantization: QuantizationSpec, device: str
) -> None:
    """Raises ModelError where a 4-bit layer would be computed with other weights than it has: an
    adapter trained on those belongs to no other machine.
    """
    inputs: dict[int, list[str]] = {}
    for name, width in bits.items():
        if width == 4:
            inputs.setdefault(_num_inputs(skeleton.model.get_submodule(name)), []).append(name)
    for num_in, names in inputs.items():
        if num_in % BLOCK_SIZE and not reads_right(
            num_in, quantization.quant_type, BLOCK_SIZE, device
        ):
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ModelError(
                f"{names[0]} has {num_in} inputs, which is no whole number of blocks of "
                f"{BLOCK_SIZE}, and bitsandbytes reads such 4-bit weights wrongly on this "
                f"processor (it mixes up their scales). Set quantization.skip_modules: [{leaves}], "
                "or use another machine."
            )


def _num_inputs(module: nn.Module) -> int:
    """Of a linear layer; GPT-2's Conv1D keeps its weight the other way round."""
    from transformers.pytorch_utils import Conv1D

    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]


def reads_right(num_in: int, quant_type: str, block_size: int, device: str) -> bool:
    """Whether bitsandbytes makes of a small matrix what its own packed numbers and scales say."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_NUM_ROWS, num_in, generator=generator).to(device)
    packed, state = quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    return torch.allclose(dequantize_4bit(packed, state), by_formula(packed, state), atol=1e-5)


def by_formula(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """code[q] · absmax of its block, the high half of each byte first; without double quantization.

    packed: uint8; returns float32 of `state.shape`.
    """
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    count = state.shape.numel()
    scales = state.absmax.repeat_interleave(state.blocksize)[:count]
    values: torch.Tensor = state.code[nibbles[:count].long()] * scales
    return values.view(state.shape)
