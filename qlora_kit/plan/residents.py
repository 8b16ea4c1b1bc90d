"""Frozen weights that stay unpacked, on tensors without numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from qlora_kit.memory.live import UNPACKED, LiveTensors
from qlora_kit.memory.ways import turned_bytes
from qlora_kit.model.fused.linear import FrozenLinear, is_frozen_linear
from qlora_kit.model.fused.residents import Make, Residents, Room
from qlora_kit.plan.few_layers import Course, FewLayers, NotAlikeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ImaginedResidents(Residents):
    """As from the second update on, when those for gradients are there before a forward pass. In
    the first the head is turned round for its gradient when of no other layer that is there yet.
    """

    live: LiveTensors = field(default_factory=LiveTensors)
    head: torch.nn.Module | None = None
    turned_bytes: int = 0
    """What turning it takes beyond what is there from the second update on."""
    _asked: set[tuple[torch.nn.Module, torch.dtype]] = field(default_factory=set)

    def reordered(
        self, module: torch.nn.Module, dtype: torch.dtype, is_transposed: bool, made: Make
    ) -> torch.Tensor | None:
        found = super().reordered(module, dtype, is_transposed, made)
        super().reordered(module, dtype, not is_transposed, lambda: made().T)
        if is_transposed:
            self._asked.add((module, dtype))
            if module is self.head and self.turned_bytes:
                self.live.pass_by(self.turned_bytes, UNPACKED)
        return found

    def hold_head(self, dtype: torch.dtype) -> None:
        """Before a pass through the layers: the head's are there from the update before, also
        where that pass is at its worst before it comes to the head.
        """
        if self.reorder is None or self.head is None or not is_frozen_linear(self.head):
            return
        base = FrozenLinear(self.head)
        super().reordered(self.head, dtype, False, lambda: base.weight(dtype))
        super().reordered(self.head, dtype, True, lambda: base.weight(dtype).T)

    @property
    def never_asked_bytes(self) -> int:
        """Of those for gradients that nothing has asked for: of the first layer's q, k and v, whose
        input has none. Where none reaches whole layers, as below the first adapter, a trial goes
        through all of them, so that none is counted for others.
        """
        return sum(
            weight.nbytes
            for (module, dtype, is_transposed), weight in self._reordered.items()
            if is_transposed and (module, dtype) not in self._asked
        )


def on_a_trial(
    stays: Room, live: LiveTensors, model: PreTrainedModel, standing_bytes: int = 0
) -> ImaginedResidents:
    """Those of the model that there is room for, counted as they come to be.

    Args:
        standing_bytes: what the trial counts that is not there yet in the first update.
    """
    made = ImaginedResidents(
        reorder=partial(_copied, live),
        live=live,
        head=model.get_output_embeddings(),
        turned_bytes=max(turned_bytes(model) - standing_bytes, 0) * stays.is_for_reordered,
    )
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
