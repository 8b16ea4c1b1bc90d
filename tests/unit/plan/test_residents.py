"""What a trial holds of weights that stay."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.memory.live import UNPACKED, LiveTensors
from qlora_kit.model.fused.residents import Room
from qlora_kit.plan.residents import on_a_trial


class _Model(torch.nn.Module):
    def __init__(self, num_entries: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 2, False)
        self.head = torch.nn.Linear(64, num_entries, False)
        self.requires_grad_(False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def _asked_for(model: _Model, is_for_reordered: bool = True) -> tuple[int, int, int]:
    """Bytes of weights that stay at most after the forward pass, and in the backward pass of a
    first and of a second micro-batch.
    """
    live = LiveTensors()
    residents = on_a_trial(Room(10**9, is_for_reordered), live, model)
    found = []
    for is_transposed in (False, True, True):
        live.forget_peak()
        for one in (model.layer, model.head):
            weight = one.weight.T if is_transposed else one.weight
            residents.reordered(one, torch.float32, is_transposed, lambda made=weight: made)
        found.append(live.peak.get(UNPACKED, 0))
    return found[0], found[1], found[2]


def test_a_head_that_is_most_of_the_model_is_turned_round_once() -> None:
    """A copy of it beside the blocks that come of it, when of no other layer's are there."""
    both = 2 * 4 * 64 * (100 + 2)
    assert _asked_for(_Model(100)) == (both, both + 4 * 64 * (100 - 2), both)


@pytest.mark.parametrize(("num_entries", "is_for_reordered"), [(2, True), (100, False)])
def test_nothing_comes_on_top(num_entries: int, is_for_reordered: bool) -> None:
    """Of a head that is no larger than the others, and of weights that are unpacked alone."""
    forward, first, second = _asked_for(_Model(num_entries), is_for_reordered)
    assert forward == first == second
    assert forward == (2 * 4 * 64 * 4 if is_for_reordered else 0)
