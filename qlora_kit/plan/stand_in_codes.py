"""Quantized weights of a training that is aware of them, on tensors without numbers.

Which weights an update has changed cannot be seen of such tensors, so a trial says it: all that are
trained are quantized anew in its first forward pass, while what they were before is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.memory.live import LiveTensors
from qlora_kit.model.qat import nf4
from qlora_kit.model.qat.linear import (
    Held,
    QuantizedConv1D,
    QuantizedLinear,
    QuantizedLora,
    codes_of,
)

if TYPE_CHECKING:
    from qlora_kit.model.qat.scheme import Codes

CODES = "quantized copies"

_DYNAMIC_MAP_ENTRIES = 256  # of bitsandbytes' table for 8 bits


@dataclass
class ImaginedHeld(Held):
    """Codes that are made anew once in each trial, where training changes what they are made of."""

    live: LiveTensors | None = None
    """What counts them."""
    is_old: bool = False

    def is_made_of(self, made_of: tuple[torch.Tensor, ...]) -> bool:
        return not (made_of and self.is_old)

    def get(self, made_of: tuple[torch.Tensor, ...], make: Callable[[], Codes]) -> Codes:
        if self.live is None or not self.is_old:
            return super().get(made_of, make)
        gone_before = self.live.gone_bytes
        codes = super().get(made_of, make)
        self.is_old = False
        self.count()
        # What is made on the way is gone before the graph, which keeps others' holes open, grows.
        self.live.gone_bytes = gone_before
        return codes

    def count(self) -> None:
        if self.live is not None and self.codes is not None:
            self.live.hold([*self.codes.tensors(), *self.made_of], CODES)


class ImaginedCodes:
    """Those of all quantized layers of a model: what is trained, and its base without that."""

    def __init__(self, model: nn.Module):
        """Call it within `quantizing_without_numbers`."""
        from peft.utils import ModulesToSaveWrapper

        originals = {
            id(one.original_module)
            for one in model.modules()
            if isinstance(one, ModulesToSaveWrapper)
        }
        self.trained: list[ImaginedHeld] = []
        self.base: list[ImaginedHeld] = []
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
        """Have them counted, as they are when an update has been made.

        Args:
            with_base: also those that the model has without what was trained, which stay from when
                it has been measured.
        """
        self.grow_old()
        for one in (*self.trained, *self.base):
            one.live = live
        for one in (*self.trained, *self.base * with_base):
            one.count()

    def grow_old(self) -> None:
        """All are of the weights before an update."""
        for one in self.trained:
            one.is_old = True


@contextmanager
def quantizing_without_numbers(device: str) -> Iterator[None]:
    """What quantizing looks up is without numbers as well. Call it where tensors are.

    Args:
        device: cpu or cuda, whose kernel makes nothing on the way that could be seen.
    """
    from bitsandbytes import functional

    tables = torch.empty(nf4.NUM_CELLS, dtype=torch.uint8), torch.empty(nf4.NUM_CELLS)
    module: Any = nf4
    dynamic, own = functional.name2qmap, (module.tables, module.quantize_on_cpu)
    functional.name2qmap = {"dynamic": torch.empty(_DYNAMIC_MAP_ENTRIES)}
    module.tables = lambda: tables
    module.quantize_on_cpu = own[1] if device == "cpu" else _packed
    try:
        yield
    finally:
        functional.name2qmap = dynamic
        module.tables, module.quantize_on_cpu = own


def _packed(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_bytes, num_blocks = weight.numel() // 2, weight.numel() // block_size
    return torch.empty((num_bytes, 1), dtype=torch.uint8), torch.empty(num_blocks)
