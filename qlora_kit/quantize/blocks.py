"""Blocks that begin in one row and end in the next, and whether bitsandbytes reads them right.

It quantizes a weight as one long row of numbers, cut into blocks. On processors with AVX-512 its
CPU code (0.50.2) reads the rows one by one as if each began a new block, so that where a row is no
whole number of blocks the scales are mixed up: with 576 inputs and blocks of 128 the error of a
weight is 0.22 instead of 0.095. Other processors and GPUs read the same file right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.errors import ModelError
from qlora_kit.quantize.layers import quantized_layers, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_kit.quantize.method import Source

_NUM_ROWS = 64
_BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64, 32)


def require_readable_blocks(
    source: Source, skip_modules: Sequence[str], quant_type: str, block_size: int
) -> None:
    """Raises ModelError where this machine would read a layer's weights other than they are."""
    inputs: dict[int, str] = {}
    for name in quantized_layers(source.skeleton, skip_modules):
        num_in = shape_of(source.skeleton.model.get_submodule(name))[1]
        inputs.setdefault(num_in, name)
    for num_in, name in inputs.items():
        if num_in % block_size and not reads_right(
            num_in, quant_type, block_size, source.hardware.device
        ):
            fitting = next(
                (size for size in _BLOCK_SIZES if all(not count % size for count in inputs)), None
            )
            leaf = name.rpartition(".")[2]
            do = f"take block_size={fitting}" if fitting else f"set skip_modules=[{leaf}]"
            raise ModelError(
                f"{name} has {num_in} inputs, which is no whole number of blocks of {block_size}, "
                "and bitsandbytes reads such weights wrongly on this processor (it mixes up their "
                f"scales); {do}."
            )


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
