"""Bytes that are alive, told with numbers and without."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.memory.live import ACTIVATIONS, GRADIENTS, LOGITS, LiveTensors

_FLOAT = 4


@pytest.mark.parametrize("is_fake", [False, True])
def test_a_peak_is_of_what_is_alive_together(is_fake: bool) -> None:
    live = LiveTensors(num_entries=7)
    with FakeTensorMode() if is_fake else nullcontext(), live:
        first = torch.zeros(100)
        second = first + 1
        view = second[:50]
        del first, second
        logits = torch.zeros(3, 7)
        assert live.now == {ACTIVATIONS: 100 * _FLOAT, LOGITS: 21 * _FLOAT}, "a view keeps it"
        del view, logits
    assert sum(live.now.values()) == 0
    assert live.peak == {ACTIVATIONS: 200 * _FLOAT}


def test_what_is_held_is_counted_once_and_under_its_last_name() -> None:
    live = LiveTensors()
    weight = torch.zeros(10)
    live.hold([weight, weight[:5]], "weights")
    assert live.peak == {"weights": 10 * _FLOAT}
    live.hold([weight], GRADIENTS)
    assert +live.now == {GRADIENTS: 10 * _FLOAT}


def test_what_is_gone_is_counted_where_the_heap_keeps_it() -> None:
    """Larger blocks go back to the system by themselves."""
    live = LiveTensors()
    with FakeTensorMode(), live:
        kept = torch.zeros(10)
        torch.zeros(100) + 1
        torch.zeros(32 * 2**20, dtype=torch.uint8)
        assert live.gone_bytes == 2 * 100 * _FLOAT
        del kept
        assert live.gone_bytes == 210 * _FLOAT


def test_a_new_peak_begins_at_what_there_is() -> None:
    live = LiveTensors()
    with live:
        kept = torch.zeros(10)
        torch.zeros(100)
        live.forget_peak()
    assert sum(live.peak.values()) == kept.numel() * _FLOAT
