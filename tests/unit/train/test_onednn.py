"""Whether oneDNN multiplies: where it is faster by this clock, and the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from qlora_kit.model.fused.lean import NO_PARTS
from qlora_kit.model.fused.products import OneDnnProducts
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import kernel_choice, kernel_race
from qlora_kit.train.kernel_race import PRODUCTS, Pair, most_weights, pair_of, raced_on_a_cpu
from qlora_kit.train.shortcuts import NONE, SWITCHES, Shortcuts, choose_shortcuts, taken

from .left_out import require_left_out_where_it_fails, require_left_out_where_off

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def model(stirred_llama: Any) -> Any:
    return stirred_llama


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By which each side takes so many seconds, also of small layers."""
    takes = {"torch": 3.0, "oneDNN": 2.0}
    sides: dict[Any, str] = {}

    def paired(*given: Any) -> Pair:
        pair = pair_of(*given)
        assert pair is not None
        sides.update({pair.by_torch: "torch", pair.by_other: "oneDNN"})
        return pair

    monkeypatch.setattr(kernel_choice, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(kernel_choice, "pair_of", paired)
    monkeypatch.setattr(kernel_race, "seconds_on_a_cpu", lambda run: takes[sides[run]])
    return takes


def chosen(model: Any, precision: str = "fp32", **train: Any) -> Shortcuts:
    return choose_shortcuts(model, TrainSpec(**train), precision, is_sharded=False)


def outcome(model: Any, taking: Shortcuts) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    with taken(model, taking):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    gradients = [one.grad for one in model.parameters()]
    return float(loss.detach()), [one.clone() for one in gradients if one is not None]


def test_it_is_taken_where_it_is_faster(model: Any, clock: dict[str, float]) -> None:
    found = chosen(model)
    assert found.onednn
    height, width = most_weights(model) or (0, 0)
    assert found.why_kernels == (
        "oneDNN's for products (1.50 ×): time of torch's over oneDNN's on 256 tokens of a layer of "
        f"{height} × {width}"
    )
    loss, gradients = outcome(model, found)
    wanted, wanted_gradients = outcome(model, NONE)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_it_multiplies_with_every_frozen_weight(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions; the first layer's q, k and v have nobody to give a gradient to. The head
    is looked at once beforehand.
    """
    found = chosen(model)
    shapes: Counter[str] = Counter()
    own = OneDnnProducts.product

    def noted(self: Any, left: torch.Tensor, right: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes["head" if model.config.vocab_size in right.shape else "layer"] += 1
        return own(self, left, right, *rest)

    monkeypatch.setattr(OneDnnProducts, "product", noted)
    outcome(model, found)
    assert shapes == {"head": 1 + 2, "layer": 14 + 11}


def test_it_is_left_where_it_is_not_faster(model: Any, clock: dict[str, float]) -> None:
    clock["oneDNN"] = clock["torch"]
    found = chosen(model)
    assert not found.onednn
    assert found.why_kernels.startswith("torch's own for products (1.00 ×)")
    assert found.left == ()
    assert chosen(model, use_onednn=True).onednn


def test_it_can_be_switched_off(model: Any, clock: dict[str, float]) -> None:
    for off in ({"use_onednn": False}, {"fused_lora": False}):
        found = chosen(model, **off)
        assert (found.onednn, found.why_kernels, found.left) == (False, "", ())
    assert chosen(model, fused_lora=False, use_onednn=True).left == (
        "oneDNN's products: it comes with LoRA as one operation",
    )
    nothing = dict.fromkeys(SWITCHES, False)
    assert "it comes with" in chosen(model, **nothing, use_onednn=True).left[0]


def test_small_layers_are_not_timed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are over before a clock tells much: two starts might differ."""

    def timed(_: Pair) -> None:
        raise AssertionError

    monkeypatch.setattr(kernel_choice, "raced_on_a_cpu", timed)
    found = chosen(model)
    assert (found.onednn, found.why_kernels, found.left) == (False, "", ())


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_products_that_come_out_otherwise_are_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    found = require_left_out_where_off(
        monkeypatch, (OneDnnProducts, "product"), factor, lambda: chosen(model), "oneDNN's products"
    )
    assert not found.onednn


def test_what_fails_is_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_left_out_where_it_fails(
        monkeypatch, (OneDnnProducts, "product"), lambda: chosen(model), "oneDNN's products"
    )


def test_in_16_bits_it_is_told_where_it_was_asked_for(model: Any, clock: dict[str, float]) -> None:
    assert "oneDNN" not in chosen(model, "bf16").why_kernels
    assert chosen(model, "bf16", use_onednn=True).left == (
        "oneDNN's products: torch takes it by itself in 16 bits",
    )


def test_it_is_timed_on_the_layers_with_the_most_weights(model: Any) -> None:
    sizes = most_weights(model)
    mlp = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    assert sizes == (mlp.out_features, mlp.in_features)
    pair = pair_of(PRODUCTS, model, NO_PARTS, torch.float32, 6)
    assert pair is not None
    assert [tuple(one.shape) for one in pair.by_other()] == [(6, sizes[0]), (6, sizes[1])]
    one = raced_on_a_cpu(pair)
    assert one.apart < 1e-5
    assert one.gain > 0
