"""Unpacked weights that stay, so that a pass need not unpack them again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Residents:
    """The first weights that are asked for, as far as there is room. None at first."""

    room_bytes: int = 0
    """For further ones."""
    _held: dict[tuple[nn.Module, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def weight(
        self, module: nn.Module, dtype: torch.dtype, unpacked: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The weight of a layer that is not trained, held or unpacked now: the same bits."""
        found = self._held.get((module, dtype))
        if found is not None:
            return found
        made = unpacked()
        if made.nbytes <= self.room_bytes:
            self._held[module, dtype] = made
            self.room_bytes -= made.nbytes
        return made

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in self._held.values())

    def release(self) -> None:
        """Hold none from here on."""
        self._held.clear()
        self.room_bytes = 0
