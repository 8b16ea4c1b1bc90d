"""What a way of quantizing in training has to offer."""

from __future__ import annotations

from typing import Protocol

import torch


class Codes(Protocol):
    """A quantized weight."""

    @property
    def device(self) -> torch.device: ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers it stands for, (out, in)."""

    def tensors(self) -> list[torch.Tensor]:
        """All that it takes memory for."""

    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of a checkpoint, by what follows the module's name."""


class Scheme(Protocol):
    """A way of quantizing."""

    @property
    def name(self) -> str: ...

    def quantize(self, weight: torch.Tensor) -> Codes:
        """weight: (out, in)."""
