"""Inputs that need not be kept for the backward pass, as they can be had again for little."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def autocast_as_now(device: str) -> Callable[[], AbstractContextManager[None]]:
    """What is made again in a backward pass, where autocast is off, is so within: of some
    activations a GPU computes parts in float32.
    """
    is_on = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if is_on else None
    return partial(torch.autocast, device, dtype=dtype, enabled=is_on)  # type: ignore[return-value]


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
        """Only where a backward pass will follow. It is made again under the autocast of now."""
        if tensor.requires_grad:
            again = partial(_made_under, autocast_as_now(tensor.device.type), make)
            self._of[tensor] = Remade(again, tuple(one.detach() for one in parts))

    def of(self, tensor: torch.Tensor) -> Remade | None:
        found: Remade | None = self._of.get(tensor)
        return found


def _made_under(
    now: Callable[[], AbstractContextManager[None]],
    make: Callable[..., torch.Tensor],
    *parts: torch.Tensor,
) -> torch.Tensor:
    with now():
        return make(*parts)
