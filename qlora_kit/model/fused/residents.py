"""Frozen weights that stay as they are multiplied, so that a pass need not make them so again:
unpacked, and in oneDNN's layout where there is room for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

Make = Callable[[], torch.Tensor]
Reorder = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Room:
    """For weights that stay."""

    num_bytes: int = 0
    is_for_reordered: bool = False
    """Whether it is enough for every frozen layer's in the layout of both directions."""

    def told(self) -> str:
        """In a few words, for people; empty where there is none."""
        if not self.num_bytes:
            return ""
        mebibytes = f"{self.num_bytes / 2**20:,.0f} MiB"
        if self.is_for_reordered:
            return f"{mebibytes} for frozen weights that stay in oneDNN's layout for each direction"
        return f"{mebibytes} for unpacked weights that stay"


NO_ROOM = Room()


@dataclass
class Residents:
    """The first weights that are asked for, as far as there is room. None at first."""

    room_bytes: int = 0
    """For further ones."""
    reorder: Reorder | None = None
    """Into the layout that they are multiplied in, one for each direction: twice the bytes, and of
    every frozen layer. None: they stay as they are.
    """
    _held: dict[tuple[nn.Module, torch.dtype], torch.Tensor] = field(default_factory=dict)
    _reordered: dict[tuple[nn.Module, torch.dtype, bool], torch.Tensor] = field(
        default_factory=dict
    )

    def weight(self, module: nn.Module, dtype: torch.dtype, unpacked: Make) -> torch.Tensor:
        """The weight of a layer that is not trained, held or unpacked now: the same bits."""
        found = self._held.get((module, dtype))
        if found is not None:
            return found
        made = unpacked()
        if self.reorder is None and made.nbytes <= self.room_bytes:
            self._held[module, dtype] = made
            self.room_bytes -= made.nbytes
        return made

    def reordered(
        self, module: nn.Module, dtype: torch.dtype, is_transposed: bool, made: Make
    ) -> torch.Tensor | None:
        """The weight for one direction in the layout that it is multiplied in; None where it does
        not stay so.
        """
        if self.reorder is None:
            return None
        key = (module, dtype, is_transposed)
        found = self._reordered.get(key)
        if found is None and self.room_bytes > 0:
            weight = made()
            if weight.nbytes > self.room_bytes:
                return None
            found = self._reordered[key] = self.reorder(weight)
            self.room_bytes -= weight.nbytes
        return found

    def reorders(self) -> bool:
        """Whether they are to lie in that layout."""
        return self.reorder is not None

    def give(self, room: Room) -> None:
        """Before the first weight is asked for."""
        self.room_bytes = room.num_bytes
        if not room.is_for_reordered:
            self.reorder = None

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for one in (*self._held.values(), *self._reordered.values()))

    @property
    def holds_reordered(self) -> bool:
        return bool(self._reordered)

    def release(self) -> None:
        """Hold none from here on."""
        self._held.clear()
        self._reordered.clear()
        self.room_bytes = 0


class ReorderedEachTime(Residents):
    """Every weight reordered for every product, and none held: for a trial, which has no room."""

    def reordered(
        self, module: nn.Module, dtype: torch.dtype, is_transposed: bool, made: Make
    ) -> torch.Tensor | None:
        """As there, but never None."""
        assert self.reorder is not None
        return self.reorder(made())
