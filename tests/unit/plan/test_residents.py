"""What a trial holds of weights that stay."""

from __future__ import annotations

from typing import Any

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


def _asked_for(
    model: Any, is_for_reordered: bool = True, standing_bytes: int = 0
) -> tuple[int, int]:
    """Bytes of weights that stay at most in the forward pass, and in the backward pass."""
    live = LiveTensors()
    residents = on_a_trial(Room(10**9, is_for_reordered), live, model, standing_bytes)
    found = []
    for is_transposed in (False, True):
        live.forget_peak()
        for one in (model.layer, model.head):
            weight = one.weight.T if is_transposed else one.weight
            residents.reordered(one, torch.float32, is_transposed, lambda made=weight: made)
        found.append(live.peak.get(UNPACKED, 0))
    return found[0], found[1]


def test_a_head_that_is_most_of_the_model_is_turned_round() -> None:
    """A copy of it beside the blocks that come of it, when of no other layer's are there."""
    both = 2 * 4 * 64 * (100 + 2)
    turned = 4 * 64 * (100 - 2)
    assert _asked_for(_Model(100)) == (both, both + turned)
    assert _asked_for(_Model(100), standing_bytes=1000) == (both, both + turned - 1000)
    assert _asked_for(_Model(100), standing_bytes=turned + 1) == (both, both)


@pytest.mark.parametrize(("num_entries", "is_for_reordered"), [(2, True), (100, False)])
def test_nothing_comes_on_top(num_entries: int, is_for_reordered: bool) -> None:
    """Of a head that is no larger than the others, and of weights that are unpacked alone."""
    forward, backward = _asked_for(_Model(num_entries), is_for_reordered)
    assert forward == backward == (2 * 4 * 64 * 4 if is_for_reordered else 0)


@pytest.mark.parametrize("is_for_reordered", [True, False])
def test_the_head_s_are_there_before_the_layers(is_for_reordered: bool) -> None:
    """In both directions, once."""
    model, live = _Model(100), LiveTensors()
    residents = on_a_trial(Room(10**9, is_for_reordered), live, model)
    residents.hold_head(torch.float32)
    both = 2 * model.head.weight.nbytes * is_for_reordered
    assert live.now[UNPACKED] == both
    residents.reordered(model.head, torch.float32, False, lambda: model.head.weight)
    assert live.now[UNPACKED] == both
    model.head.requires_grad_(True)
    residents = on_a_trial(Room(10**9, is_for_reordered), live, model)
    residents.hold_head(torch.float32)
    assert not live.now[UNPACKED], "of a head that is trained none stay"


def test_weights_that_no_gradient_is_asked_of_are_not_turned_round() -> None:
    """Of the first layer: its input has none."""
    model = _Model(8)
    residents = on_a_trial(Room(10**9, is_for_reordered=True), LiveTensors(), model)
    for one in (model.layer, model.head):
        residents.reordered(one, torch.float32, False, lambda made=one.weight: made)
    assert residents.never_asked_bytes == 4 * 64 * (2 + 8)
    residents.reordered(model.head, torch.float32, True, lambda: model.head.weight.T)
    assert residents.never_asked_bytes == 4 * 64 * 2
