"""Which layers recompute, and that it changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.errors import ModelError
from qlora_kit.memory.kept import recomputing_layers
from qlora_kit.train.recompute import Recompute, able_to_recompute


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.requires_grad_(False)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()


def loss_of(model: Any, length: int) -> torch.Tensor:
    ids = torch.arange(length)[None] % 300
    labels = ids.masked_fill(torch.arange(length) < length - 2, -100)
    loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def test_layers_recompute_as_told_and_not_afterwards(model: Any) -> None:
    layers = recomputing_layers(model)
    with able_to_recompute(model):
        assert not any(one.gradient_checkpointing for one in layers)
        recompute = Recompute(model, 1, len(layers))
        assert [one.gradient_checkpointing for one in layers] == [True, False]
        assert recompute.can_give_more()
        recompute.all()
        assert all(one.gradient_checkpointing for one in layers)
        assert not recompute.can_give_more()
    assert not any(one.gradient_checkpointing for one in layers)


def test_the_numbers_are_the_same_whoever_recomputes(model: Any) -> None:
    with able_to_recompute(model):
        found = []
        for count in (0, 1, 2):
            Recompute(model, count, 2)
            model.zero_grad()
            loss = loss_of(model, 40)
            loss.backward()
            trained = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            found.append((float(loss.detach()), trained))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.equal(one, other)


class TestAnArchitectureThatCannot:
    def test_is_told_where_it_is_asked_for(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        type(model.get_base_model()).supports_gradient_checkpointing = False
        try:
            with (
                pytest.raises(ModelError, match="llama cannot recompute"),
                able_to_recompute(model),
            ):
                pass
            with able_to_recompute(model, "auto"):
                assert not any(one.gradient_checkpointing for one in recomputing_layers(model))
        finally:
            del type(model.get_base_model()).supports_gradient_checkpointing


def test_nothing_is_prepared_where_the_recipe_says_no(model: Any) -> None:
    with able_to_recompute(model, False):
        assert not any(hasattr(one, "_gradient_checkpointing_func") for one in model.modules())
