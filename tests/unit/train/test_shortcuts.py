"""Shortcuts are tried before they are relied on, and left out where the trial says so."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from qlora_kit.model.fused import linear
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import supervised_loss
from qlora_kit.train.shortcuts import NONE, SWITCHES, choose_shortcuts, taken

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def model(adapted_llama: Any) -> Any:
    return adapted_llama


def chosen(model: Any, **train: Any) -> Any:
    return choose_shortcuts(model, TrainSpec(**train), "fp32", is_sharded=False)


def test_both_are_taken_and_nothing_is_changed_by_the_trial(model: Any) -> None:
    before = {name: one.clone() for name, one in model.state_dict().items()}
    random = torch.get_rng_state()
    found = chosen(model)
    assert found.supervised_loss
    assert found.fusion.num_layers == 14
    assert (len(found.lean.mlps), len(found.lean.norms)) == (2, 5)
    assert found.lean.rotary == ("transformers.models.llama.modeling_llama",)
    assert found.last_mlp == "base_model.model.model.layers.1.mlp"
    assert 0 < found.difference < 1e-5
    assert found.left == ()
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, one in model.state_dict().items():
        assert torch.equal(one, before[name]), name
    assert all(one.grad is None for one in model.parameters())


def test_each_can_be_switched_off(model: Any) -> None:
    assert chosen(model, **dict.fromkeys(SWITCHES, False)) == NONE
    assert chosen(model, fused_loss=False).supervised_loss is False
    assert chosen(model, fused_lora=False).fusion is None
    assert chosen(model, fused_loss=False).last_mlp is None
    assert chosen(model, fused_mlp=False).lean.mlps == ()
    assert chosen(model, fused_mlp=False).last_mlp is None
    assert chosen(model, fused_norm=False).lean.norms == {}
    assert chosen(model, fused_rotary=False).lean.rotary == ()
    sharded = choose_shortcuts(model, TrainSpec(), "fp32", is_sharded=True)
    assert (sharded.supervised_loss, sharded.fusion) == (False, None)
    assert "several GPUs" in sharded.left[0]


def test_a_gradient_that_is_wrong_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel would be that computes something else on this machine."""
    own = linear._SharedInput.backward

    def wrong(ctx: Any, *gradients: Any) -> Any:
        of_x, *others = own(ctx, *gradients)
        return None if of_x is None else 1.001 * of_x, *others

    monkeypatch.setattr(linear._SharedInput, "backward", staticmethod(wrong))
    found = chosen(model)
    assert found.fusion is None
    assert "LoRA as one operation: on a trial the gradients differ" in found.left[0]
    assert found.supervised_loss, "the other one is as good as before"


def test_a_loss_that_is_wrong_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = supervised_loss._with_gradient

    def wrong(*given: Any) -> Any:
        loss, of_logits = own(*given)
        return 1.001 * loss, of_logits

    monkeypatch.setattr(supervised_loss, "_with_gradient", wrong)
    found = chosen(model)
    assert not found.supervised_loss
    assert "on a trial the loss is" in found.left[0]


def test_what_others_read_of_the_last_mlp_is_found(model: Any) -> None:
    """Behind it places are mixed, as in no model that is known here."""
    norm = model.get_base_model().model.norm
    own = norm.forward
    norm.forward = lambda x: own(x + 0.1 * x.mean(1, keepdim=True))
    found = chosen(model)
    assert found.last_mlp is None
    assert found.left == (
        "the last MLP at supervised places alone: the loss depends on what it gives at others",
    )
    assert found.supervised_loss
    assert len(found.lean.mlps) == 2


class TimeFirst(torch.nn.Module):
    """An MLP that is given (S, B, H), as a model of one's own may have it."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.mlp(x.transpose(0, 1)).transpose(0, 1)
        return y


def test_places_in_another_order_are_found(model: Any) -> None:
    layer = model.get_base_model().model.layers[1]
    layer.mlp = TimeFirst(layer.mlp)
    found = chosen(model)
    assert found.last_mlp is None
    assert "the loss depends on what it gives at others" in found.left[0]
    assert len(found.lean.mlps) == 2


def test_without_the_loss_there_is_no_last_mlp(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(supervised_loss, "chunked_cross_entropy", fails)
    found = chosen(model)
    assert not found.supervised_loss
    assert found.last_mlp is None


def test_what_fails_is_left_out(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(linear._SharedInput, "forward", staticmethod(fails))
    assert "it fails (RuntimeError: no kernel" in chosen(model).left[0]


def test_a_model_whose_loss_has_other_parts_keeps_its_own(model: Any) -> None:
    model.get_base_model().config.output_router_logits = True
    found = chosen(model)
    assert not found.supervised_loss
    assert "routers" in found.left[0]


def test_without_a_gpu_liger_is_told_of_where_it_was_asked_for(model: Any) -> None:
    assert chosen(model).why_kernels == ""
    assert chosen(model, use_liger_kernel=True).left == (
        "Liger's kernels: Triton kernels need a GPU",
    )


def test_they_last_as_long_as_the_context(model: Any) -> None:
    found = chosen(model)
    with taken(model, found):
        assert model(input_ids=IDS, labels=IDS, use_cache=False).logits is None
    assert model(input_ids=IDS, labels=IDS, use_cache=False).logits is not None
    assert all("forward" not in one.__dict__ for one in model.modules())
    assert inspect.isfunction(modeling_llama.apply_rotary_pos_emb)
