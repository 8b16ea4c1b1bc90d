"""Inputs that need not be kept for the backward pass, as they can be had again for little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Remade:
    """A tensor as what it is made of."""

    make: Callable[..., torch.Tensor]
    """Takes the parts; gives the same numbers, to the bit."""
    parts: tuple[torch.Tensor, ...]
    """Kept by others anyway, or small."""


@dataclass(frozen=True)
class Origins:
    """How tensors that are alive came about, for those who are handed them later."""

    _of: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def note(
        self, tensor: torch.Tensor, make: Callable[..., torch.Tensor], *parts: torch.Tensor
    ) -> None:
        """Only where a backward pass will follow."""
        if tensor.requires_grad:
            self._of[tensor] = Remade(make, tuple(one.detach() for one in parts))

    def of(self, tensor: torch.Tensor) -> Remade | None:
        found: Remade | None = self._of.get(tensor)
        return found
