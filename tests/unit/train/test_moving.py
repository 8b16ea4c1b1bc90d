"""The state of a training in progress, taken and put back."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import ConstantLR

from qlora_kit.model.manifest import Manifest
from qlora_kit.model.saved import AdapterFiles
from qlora_kit.train.snapshot import Moving

MANIFEST = Manifest("a", None, "b", {}, "c", None, "d", {}, "e", {})


def moving(scaler: torch.amp.GradScaler | None) -> Moving:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    files = AdapterFiles({}, {}, {"w": "weight", "b": "bias"}, MANIFEST)
    return Moving(model, optimizer, ConstantLR(optimizer), scaler, files)


def overflowed(scaler: torch.amp.GradScaler) -> None:
    """Once it has met gradients that are not finite, it has halved its scale."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight])
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()


def test_the_scale_of_fp16_is_kept_and_put_back() -> None:
    begun = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    overflowed(begun)
    state = moving(begun).state()
    fresh = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=7)
    moving(fresh).put_back(state, update=1)
    assert begun.get_scale() == fresh.get_scale() == 512.0
    assert fresh.state_dict() == begun.state_dict()


def test_a_state_without_a_scale_leaves_the_scaler_as_it_is() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    moving(scaler).put_back(moving(None).state(), update=1)
    assert scaler.get_scale() == 1024.0
