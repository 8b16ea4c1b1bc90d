"""What quantizing would make of a weight, without keeping it quantized: its image.

A model in which a weight is replaced by its image computes what the quantized model computes, so
one model in memory serves to try any number of ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from qlora_kit.errors import ModelError

Kind = Literal["nf4", "fp4", "int4", "int8", "none"]
KINDS: tuple[Kind, ...] = ("nf4", "fp4", "int4", "int8", "none")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# What bitsandbytes keeps beside the packed numbers of one matrix: a table of 16 values, with
# double quantization one of 256 as well and the offset of the scales.
_CODE_BYTES = 16 * 4
_NESTED_CODE_BYTES = 256 * 4 + 4
_NESTED_BLOCK = 256
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Rounding:
    """One way to round weights.

    `nf4` and `fp4` are bitsandbytes', with a scale for each `block_size` numbers; `int4` are the
    integers -8 … 7 with a scale for each `block_size` numbers of a row, rounded to the nearest;
    `int8` is LLM.int8(), one scale a row; `none` leaves weights as they are.
    """

    kind: Kind = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"there is no method {self.kind}; take one of {', '.join(KINDS)}.")
        if self.block_size not in BLOCK_SIZES:
            raise ModelError(
                f"the block size must be one of {', '.join(map(str, BLOCK_SIZES))}, got "
                f"{self.block_size}."
            )

    @property
    def num_bits(self) -> int:
        return {"none": 16, "int8": 8}.get(self.kind, 4)

    def __str__(self) -> str:
        if self.kind in ("none", "int8"):
            return {"none": "16 bits", "int8": "8 bits"}[self.kind]
        double = " + double quantization" if self._nests else ""
        return f"{self.kind}, block {self.block_size}{double}"

    @property
    def _nests(self) -> bool:
        return self.double_quant and self.kind in ("nf4", "fp4")

    def num_bytes(self, num_out: int, num_in: int, bytes_unquantized: int = 2) -> int:
        """What a matrix of this shape takes in memory, scales included."""
        count = num_out * num_in
        if self.kind == "none":
            return count * bytes_unquantized
        if self.kind == "int8":
            return count + num_out * _FLOAT_BYTES
        if self.kind == "int4":
            return -(-count // 2) + num_out * -(-num_in // self.block_size) * 2
        scales = -(-count // self.block_size)
        kept = scales * _FLOAT_BYTES
        if self._nests:
            kept = scales + -(-scales // _NESTED_BLOCK) * _FLOAT_BYTES + _NESTED_CODE_BYTES
        return -(-count // 2) + kept + _CODE_BYTES

    def image(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantize and dequantize; weight: (out, in). A new tensor of the same dtype."""
        if self.kind == "none":
            return weight.clone()
        if self.kind == "int8":
            return _int8(weight)
        if self.kind == "int4":
            return _int4(weight, self.block_size)
        return self._bitsandbytes(weight)

    def _bitsandbytes(self, weight: torch.Tensor) -> torch.Tensor:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            weight.contiguous(),
            blocksize=self.block_size,
            compress_statistics=self.double_quant,
            quant_type=self.kind,
        )
        image: torch.Tensor = functional.dequantize_4bit(packed, state)
        return image


def image_of(module: nn.Module, rounding: Rounding) -> torch.Tensor:
    """The image of a linear module's weight in the module's own orientation.

    bitsandbytes quantizes GPT-2's Conv1D, stored (in, out), the other way round.
    """
    image = rounding.image(turned_weight(module))
    return image.T.contiguous() if _is_turned(module) else image


def turned_weight(module: nn.Module) -> torch.Tensor:
    """A linear module's weight as (out, in)."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if _is_turned(module) else weight.detach()


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module."""
    num_out, num_in = turned_weight(module).shape
    return num_out, num_in


def _is_turned(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _int8(weight: torch.Tensor) -> torch.Tensor:
    """As bitsandbytes does it, of a float16 copy: one scale a row."""
    from bitsandbytes import functional

    rows, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    image: torch.Tensor = (rows.float() * (scale.float().view(-1, 1) / 127.0)).to(weight.dtype)
    return image


def _int4(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Symmetric, the scales in 16 bits; a row's last block may be short."""
    num_out, num_in = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -num_in % block_size))
    blocks = padded.view(num_out, -1, block_size)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 7).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (blocks / scale).round().clamp(-8, 7) * scale
    return rounded.view(num_out, -1)[:, :num_in].to(weight.dtype).contiguous()
