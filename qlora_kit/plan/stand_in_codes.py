"""Quantized weights of a training that is aware of them, on tensors without numbers.

Which weights an update has changed cannot be seen of such tensors, so a trial says it: all that are
trained are quantized anew in its first forward pass, while what they were before is still there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from qlora_kit.memory.live import LiveTensors
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.model.qat.linear import (
    Held,
    QuantizedConv1D,
    QuantizedLinear,
    QuantizedLora,
    codes_of,
)
from qlora_kit.model.qat.nf4 import NUM_CELLS, Nf4, Nf4Codes, quantize_on_cpu

if TYPE_CHECKING:
    from qlora_kit.model.qat.scheme import Codes

CODES = "quantized copies"

_DYNAMIC_MAP_ENTRIES = 256  # of bitsandbytes' table for 8 bits


@dataclass
class ImaginedHeld(Held):
    """Codes that are made anew once where a trial has an update change what they are made of."""

    live: LiveTensors | None = None
    """What counts them."""
    is_old: bool = False

    def is_made_of(self, made_of: tuple[torch.Tensor, ...]) -> bool:
        return not (made_of and self.is_old)

    def get(self, made_of: tuple[torch.Tensor, ...], make: Callable[[], Codes]) -> Codes:
        gone_before = 0 if self.live is None else self.live.gone_bytes
        was_old, codes = self.is_old, super().get(made_of, make)
        self.is_old = False
        if was_old and self.live is not None:
            self.count()
            # What is made on the way is gone before the graph, which keeps others' holes open,
            # grows.
            self.live.gone_bytes = gone_before
        return codes

    def count(self) -> None:
        if self.live is not None and self.codes is not None:
            self.live.hold([*self.codes.tensors(), *self.made_of], CODES)


class ImaginedCodes:
    """Those of all quantized layers of a model: what is trained, and its base without that."""

    def __init__(self, model: nn.Module, device: str):
        """Call it where tensors are without numbers.

        Args:
            device: cpu or cuda, whose kernel makes nothing on the way that could be seen.
        """
        self.trained: list[ImaginedHeld] = []
        self.base: list[ImaginedHeld] = []
        shared = fake_quantization_of(model)
        if shared is None:
            return
        if isinstance(shared.scheme, Nf4):
            shared.scheme = ImaginedNf4(
                shared.scheme.block_size, shared.scheme.double_quant, device
            )
        originals = {
            id(one.original_module)
            for one in model.modules()
            if isinstance(one, ModulesToSaveWrapper)
        }
        for layer in model.modules():
            if isinstance(layer, QuantizedLora):
                layer.held, layer.held_without_update = ImaginedHeld(), ImaginedHeld()
                layer.codes(*layer.active_adapters)
                layer.base_codes()
                self.trained.append(layer.held)
                self.base.append(layer.held_without_update)
            elif isinstance(layer, QuantizedLinear | QuantizedConv1D):
                layer.held = ImaginedHeld()
                codes_of(layer)
                (self.base if id(layer) in originals else self.trained).append(layer.held)

    def hold(self, live: LiveTensors, with_base: bool = False) -> None:
        """Have them counted, as they are and as they will be.

        Args:
            with_base: also those that the model has without what was trained, which stay from when
                it has been measured.
        """
        for one in (*self.trained, *self.base):
            one.live = live
        for one in (*self.trained, *self.base * with_base):
            one.count()

    def age(self, is_old: bool = True) -> None:
        """Whether all are of the weights before an update."""
        for one in self.trained:
            one.is_old = is_old


@dataclass(frozen=True)
class ImaginedNf4(Nf4):
    """The same with tables that have no numbers, and on a GPU in one step, as its kernel does."""

    device: str = "cpu"

    def quantize(self, weight: torch.Tensor) -> Nf4Codes:
        if self.device == "cpu" and weight.numel() % (2 * self.block_size) == 0:
            tables = torch.empty(NUM_CELLS, dtype=torch.uint8), torch.empty(NUM_CELLS)
            packed, absmax = quantize_on_cpu(weight, self.block_size, tables)
        else:
            num_bytes, num_blocks = -(-weight.numel() // 2), -(-weight.numel() // self.block_size)
            packed = torch.empty((num_bytes, 1), dtype=torch.uint8)
            absmax = torch.empty(num_blocks)
        return Nf4Codes(packed, self._state(weight, absmax, torch.empty(_DYNAMIC_MAP_ENTRIES)))
