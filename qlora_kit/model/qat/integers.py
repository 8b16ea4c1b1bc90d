"""Symmetric integers: w ≈ scale · q, a scale for each row (int8) or group of inputs (int4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Integers:
    """Round to the nearest of the integers from `lowest` to `highest`, times a scale.

    The scale is taken from the weight at every update: the largest magnitude of a group over
    `half_range`. With 4 bits that is 7.5, as in torchao and llm-compressor, so a largest weight
    that is positive is rounded down to 7.
    """

    name: str
    num_bits: int
    half_range: float
    lowest: int
    highest: int
    group_size: int | None
    """Inputs of a row that share a scale; None: all of them."""
    scale_dtype: torch.dtype
    """What scales are stored in."""

    def quantize(self, weight: torch.Tensor) -> IntegerCodes:
        """weight: (out, in)."""
        groups = weight.float().reshape(weight.shape[0], -1, self.group_size or weight.shape[1])
        scale = (groups.abs().amax(dim=-1) / self.half_range).to(self.scale_dtype)
        scale = torch.where(scale > 0, scale, 1.0)  # where there is nothing but zeros
        codes = (groups / scale.float().unsqueeze(-1)).round_()
        codes = codes.clamp_(self.lowest, self.highest).to(torch.int8)
        return IntegerCodes(codes.view(weight.shape), scale, self.num_bits)


def int8(scale_dtype: torch.dtype) -> Integers:
    return Integers("int8", 8, 127.0, -127, 127, None, scale_dtype)


def int4_group(group_size: int, scale_dtype: torch.dtype) -> Integers:
    return Integers("int4-group", 4, 7.5, -8, 7, group_size, scale_dtype)


@dataclass(frozen=True)
class IntegerCodes:
    """A quantized weight: `codes` (out, in) int8, `scale` (out, groups)."""

    codes: torch.Tensor
    scale: torch.Tensor
    num_bits: int

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """scale · q computed in `dtype`, as compressed-tensors does where it is loaded in that."""
        num_out, num_in = self.codes.shape
        groups = self.codes.view(num_out, self.scale.shape[1], -1).to(dtype)
        return groups.mul_(self.scale.to(dtype).unsqueeze(-1)).view(num_out, num_in)

    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scale]

    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint, by what follows the module's name: compressed-tensors' packing.

        Raises:
            ImportError: compressed-tensors is not installed.
        """
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        return {
            ".weight_packed": pack_to_int32(self.codes, self.num_bits),
            ".weight_scale": self.scale,
            ".weight_shape": torch.tensor(self.codes.shape),
        }
