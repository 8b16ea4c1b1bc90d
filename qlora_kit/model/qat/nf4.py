"""NF4 as bitsandbytes stores it, quantized at every update: the same codes, sooner."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qlora_kit.model.quantized import quant_state_tensors

# fp32 numbers that share their upper 16 bits: a cell. Two bounds of NF4 never share one.
NUM_CELLS = 1 << 16


@dataclass(frozen=True)
class Nf4:
    """Blocks of `block_size` weights, row after row, each with a scale of its own."""

    block_size: int
    double_quant: bool
    name = "nf4"

    def quantize(self, weight: torch.Tensor) -> Nf4Codes:
        """weight: (out, in)."""
        import bitsandbytes.functional as bnb

        if weight.device.type != "cpu" or weight.numel() % (2 * self.block_size):
            packed, state = bnb.quantize_4bit(
                weight.contiguous(),
                blocksize=self.block_size,
                compress_statistics=self.double_quant,
                quant_type="nf4",
            )
            return Nf4Codes(packed, state)
        packed, absmax = quantize_on_cpu(weight, self.block_size)
        return Nf4Codes(packed, self._state(weight, absmax))

    def _state(
        self, weight: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor | None = None
    ) -> Any:
        """What `bnb.quantize_4bit` returns beside the codes.

        Args:
            table: of the 8 bits that scales are kept in; unset: bitsandbytes' own.
        """
        import bitsandbytes.functional as bnb

        nested: dict[str, Any] = {}
        if self.double_quant:
            offset = absmax.mean()
            absmax, second = bnb.quantize_blockwise(absmax - offset, code=table, blocksize=256)
            nested = {"offset": offset, "state2": second}
        return bnb.QuantState(
            absmax=absmax,
            shape=weight.shape,
            dtype=weight.dtype,
            blocksize=self.block_size,
            code=bnb.get_4bit_type("nf4", device=weight.device),
            quant_type="nf4",
            **nested,
        )


@dataclass(frozen=True)
class Nf4Codes:
    """A quantized weight: half a byte for each of its numbers, and bitsandbytes' state."""

    packed: torch.Tensor
    state: Any

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """As a Linear4bit layer has it in its product, (out, in)."""
        import bitsandbytes.functional as bnb

        self.state.dtype = dtype
        weight: torch.Tensor = bnb.dequantize_4bit(self.packed, self.state)
        return weight

    def tensors(self) -> list[torch.Tensor]:
        return [self.packed, *quant_state_tensors(self.state)]

    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint, by what follows the module's name."""
        parts = self.state.as_dict(packed=True)
        return {".weight": self.packed, **{f".weight.{key}": one for key, one in parts.items()}}


Tables = tuple[torch.Tensor, torch.Tensor]


def quantize_on_cpu(
    weight: torch.Tensor, block_size: int, tables: Tables | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed codes and scales of bitsandbytes' own CPU kernel, bit for bit.

    That kernel searches the 15 bounds between codes for every weight, which takes longer than the
    product the weight is for. Here a table over the upper half of the number says the code, or the
    lower of two codes and the bound between them. The arithmetic before is the kernel's
    (`bitsandbytes/backends/default/ops.py`); a test holds the two equal.

    Args:
        weight: any shape, of a multiple of 2 * block_size numbers.
        tables: in place of those that it looks up.
    """
    blocks = weight.contiguous().view(-1, block_size).float()
    absmax = blocks.abs().amax(dim=-1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38).view(-1, 1))
    scaled = scaled.clamp_(-1, 1).view(-1)
    lower_codes, bounds = _tables() if tables is None else tables
    cells = (scaled.view(torch.int32) >> 16).bitwise_and_(NUM_CELLS - 1)
    codes = lower_codes.index_select(0, cells)
    codes += scaled > bounds.index_select(0, cells)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax


@cache
def _tables() -> Tables:
    """By cell: the lowest code in it, and the bound above that, infinite where none is inside."""
    import bitsandbytes.functional as bnb

    code = bnb.get_4bit_type("nf4", device="cpu")
    between = (code[:-1] + code[1:]) / 2
    upper = torch.arange(NUM_CELLS, dtype=torch.int64)
    upper = torch.where(upper >= NUM_CELLS // 2, upper - NUM_CELLS, upper) << 16
    ends = [
        torch.bucketize((upper | lower).to(torch.int32).view(torch.float32), between)
        for lower in (0, NUM_CELLS - 1)
    ]
    lowest, highest = torch.minimum(*ends), torch.maximum(*ends)
    is_number = upper.to(torch.int32).view(torch.float32).isfinite()
    assert bool((highest - lowest)[is_number].max() <= 1), "two bounds of NF4 share a cell"
    bounds = torch.where(lowest == highest, torch.inf, between[lowest.clamp(max=len(between) - 1)])
    return lowest.to(torch.uint8), bounds
