"""Frozen weights that stay unpacked, on tensors without numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from qlora_kit.memory.live import UNPACKED, LiveTensors
from qlora_kit.memory.ways import turned_bytes
from qlora_kit.model.fused.residents import Make, Residents, Room
from qlora_kit.plan.few_layers import Course, FewLayers, NotAlikeError


@dataclass
class _BothAtOnce(Residents):
    """Those for gradients are there from the second update on, when a forward pass begins. In the
    first update the head is turned round for its gradient when of no other layer that is there yet.
    """

    live: LiveTensors = field(default_factory=LiveTensors)
    turned_bytes: int = 0
    """What turning it takes beyond what is there from the second update on; 0 behind it."""

    def reordered(
        self, module: torch.nn.Module, dtype: torch.dtype, is_transposed: bool, made: Make
    ) -> torch.Tensor | None:
        found = super().reordered(module, dtype, is_transposed, made)
        super().reordered(module, dtype, not is_transposed, lambda: made().T)
        if is_transposed and self.turned_bytes:
            self.live.hold([torch.empty(self.turned_bytes, dtype=torch.uint8)], UNPACKED)
            self.turned_bytes = 0
        return found


def on_a_trial(stays: Room, live: LiveTensors, model: torch.nn.Module) -> Residents:
    """Those of the model that there is room for, counted as they come to be."""
    turned = turned_bytes(model) if stays.is_for_reordered else 0
    made = _BothAtOnce(reorder=partial(_copied, live), live=live, turned_bytes=turned)
    made.give(stays)
    return made


def _copied(live: LiveTensors, weight: torch.Tensor) -> torch.Tensor:
    """In place of one in oneDNN's layout, which a tensor without numbers cannot be in."""
    made = weight.clone()
    live.hold([made], UNPACKED)
    return made


def require_all_alike(
    few: FewLayers | None, residents: Residents, course: Course, stays: Room
) -> None:
    """Raises NotAlikeError: a few layers do not tell which weights stay."""
    is_any = residents.num_bytes > 0
    if few is not None and is_any and course.most_added(UNPACKED) > stays.num_bytes:
        raise NotAlikeError("the first layers' weights stay, and the last ones' do not")
