"""Whether oneDNN multiplies, and weights lie in its layout: where that is faster by this clock, and
the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit import kept
from qlora_kit.model.fused.lean import NO_PARTS
from qlora_kit.model.fused.products import OneDnnProducts, reordered, why_no_reordered
from qlora_kit.model.fused.residents import Residents
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import kernel_race, product_choice, shortcuts
from qlora_kit.train.kernel_race import (
    LAYOUT,
    LOGITS,
    PRODUCTS,
    Pair,
    Raced,
    most_weights,
    pair_of,
    raced_on_a_cpu,
    timed_sizes,
)
from qlora_kit.train.product_choice import may_reorder, will_reorder
from qlora_kit.train.shortcuts import NONE, SWITCHES, Shortcuts, choose_shortcuts, taken

from .left_out import require_left_out_where_it_fails, require_left_out_where_off

IDS = torch.arange(3, 40)[None]
SIDES = {
    PRODUCTS: ("torch", "oneDNN"),
    LAYOUT: ("oneDNN", "its layout"),
    LOGITS: ("torch", "its logits"),
}


@pytest.fixture
def model(stirred_llama: Any) -> Any:
    return stirred_llama


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test times by its own clock."""
    monkeypatch.setattr(kept, "recall", lambda *_: None)
    monkeypatch.setattr(kept, "keep", lambda *_: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By which each side takes so many seconds, also of small layers."""
    takes = {"torch": 3.0, "oneDNN": 2.0, "its layout": 1.6, "its logits": 3.0}
    sides: dict[Any, str] = {}

    def paired(operation: str, *given: Any) -> Pair:
        pair = pair_of(operation, *given)
        assert pair is not None
        one, other = SIDES[operation]
        sides.update({pair.by_torch: one, pair.by_other: other})
        return pair

    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 0)
    monkeypatch.setattr(product_choice, "pair_of", paired)
    monkeypatch.setattr(kernel_race, "seconds_on_a_cpu", lambda run: takes[sides[run]])
    return takes


def chosen(model: Any, precision: str = "fp32", **train: Any) -> Shortcuts:
    return choose_shortcuts(model, TrainSpec(**train), precision, is_sharded=False)


def with_two_threads(call: Callable[[], Any]) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def outcome(
    model: Any, taking: Shortcuts, residents: Residents | None = None
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    with taken(model, taking, residents):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    gradients = [one.grad for one in model.parameters()]
    return float(loss.detach()), [one.clone() for one in gradients if one is not None]


def require_as_by_torch(model: Any, made: tuple[float, list[torch.Tensor]]) -> None:
    """Loss and gradients, up to rounding."""
    loss, gradients = made
    wanted, wanted_gradients = outcome(model, NONE)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_it_is_taken_where_it_is_faster(model: Any, clock: dict[str, float]) -> None:
    found = chosen(model)
    assert (found.onednn, found.reorders) == (True, True)
    height, width = most_weights(model) or (0, 0)
    assert found.why_kernels == (
        "oneDNN's for products (1.50 ×), oneDNN's layout for weights that stay (1.25 ×): time of "
        f"torch's over oneDNN's on 256 tokens of a layer of {height} × {width}"
    )
    require_as_by_torch(model, outcome(model, found, Residents(1 << 30, reordered)))


def test_it_multiplies_with_every_frozen_weight(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions; the first layer's q, k and v have nobody to give a gradient to. The head
    is looked at once beforehand.
    """
    found = chosen(model)
    shapes: Counter[str] = Counter()
    own = OneDnnProducts.product

    own_sum = OneDnnProducts.add_product

    def noted(self: Any, left: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(left) > 1:  # of one row a product is made of two
            shapes["head" if model.config.vocab_size in weight.shape else "layer"] += 1
        return own(self, left, weight, *rest)

    def sum_noted(self: Any, *given: torch.Tensor) -> torch.Tensor:
        shapes["layer"] += 1
        return own_sum(self, *given)

    monkeypatch.setattr(OneDnnProducts, "product", noted)
    monkeypatch.setattr(OneDnnProducts, "add_product", sum_noted)
    outcome(model, found)
    assert shapes == {"head": 1 + 2, "layer": 14 + 11}


def test_it_is_left_where_it_is_not_faster(model: Any, clock: dict[str, float]) -> None:
    clock.update(dict.fromkeys(clock, 3.0))
    found = chosen(model)
    assert (found.onednn, found.reorders, found.left) == (False, False, ())
    assert found.why_kernels.startswith(
        "torch's own for products (1.00 ×), torch's own for logits (1.00 ×), torch's layout for "
        "weights that stay (1.00 ×)"
    )
    assert not found.onednn_logits
    found = chosen(model, use_onednn=True)
    assert (found.onednn, found.reorders, found.onednn_logits) == (True, True, False)


def test_logits_go_by_themselves(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch's products are faster with layers, and slower where they are as wide as a
    vocabulary: forward alone. The head is looked at once beforehand.
    """
    clock.update({"oneDNN": 3.2, "its layout": 3.2, "its logits": 2.0})
    found = chosen(model)
    assert (found.onednn, found.reorders, found.onednn_logits) == (False, False, True)
    height, width = most_weights(model) or (0, 0)
    entries = model.config.vocab_size
    assert found.why_kernels == (
        "torch's own for products (0.94 ×), oneDNN's for logits (1.50 ×), torch's layout for "
        "weights that stay (1.00 ×): time of torch's over oneDNN's on 256 tokens of a layer of "
        f"{height} × {width} and {entries} × {model.config.hidden_size} of the head"
    )
    shapes: list[tuple[int, ...]] = []
    own = OneDnnProducts.product

    def noted(self: Any, left: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(left) > 1:  # of one row a product is made of two
            shapes.append((*left.shape, *weight.shape))
        return own(self, left, weight, *rest)

    monkeypatch.setattr(OneDnnProducts, "product", noted)
    made = outcome(model, found)
    wide = model.config.hidden_size
    assert shapes == [(2, wide, entries, wide), (IDS.numel() - 1, wide, entries, wide)]
    require_as_by_torch(model, made)


def test_logits_that_fail_on_the_model_are_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.update({"oneDNN": 3.2, "its layout": 3.2, "its logits": 2.0})
    own = OneDnnProducts.product

    def fails(self: Any, left: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(left) < 256:
            raise RuntimeError("could not create a primitive")
        return own(self, left, *rest)

    monkeypatch.setattr(OneDnnProducts, "product", fails)
    found = chosen(model)
    assert not found.onednn_logits
    (why,) = found.left
    assert why.startswith("oneDNN's logits: it fails (RuntimeError: could not create a primitive")
    assert found.fusion is not None


def test_a_head_is_timed_where_layers_are_small(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where it is small itself."""
    clock["its logits"] = 2.0
    height, width = most_weights(model) or (0, 0)
    head = model.get_output_embeddings()
    assert height * width < head.out_features * head.in_features
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", height * width + 1)
    found = chosen(model)
    assert (found.onednn, found.reorders, found.onednn_logits) == (False, False, True)
    assert found.why_kernels == (
        "oneDNN's for logits (1.50 ×): time of torch's over oneDNN's on 256 tokens of "
        f"{head.out_features} × {head.in_features} of the head"
    )
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 1 << 30)
    found = chosen(model)
    assert (found.onednn_logits, found.why_kernels, found.left) == (False, "", ())


@pytest.mark.parametrize(
    "lora",
    [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["with an adapter", "trained whole"],
)
def test_a_head_that_is_trained_stays_torch_s(
    clock: dict[str, float], tiny_llama: Path, lora: dict[str, Any]
) -> None:
    clock.update({"oneDNN": 3.2, "its layout": 3.2, "its logits": 2.0})
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    how = {"r": 4, "target_modules": ["q_proj"], **lora}
    found = chosen(get_peft_model(base, LoraConfig(**how)))
    assert (found.onednn, found.onednn_logits, found.left) == (False, False, ())
    assert "logits" not in found.why_kernels


def test_only_a_frozen_head_is_timed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a part of its vocabulary, where that is large."""
    head = model.get_output_embeddings()
    assert timed_sizes(model, LOGITS) == (head.out_features, head.in_features)
    monkeypatch.setattr(kernel_race, "_MOST_ENTRIES", 5)
    assert timed_sizes(model, LOGITS) == (5, head.in_features)
    pair = pair_of(LOGITS, model, NO_PARTS, torch.float32, 6)
    assert pair is not None
    assert [tuple(one.shape) for one in pair.by_other()] == [(6, 5)]
    head.weight.requires_grad_()
    assert timed_sizes(model, LOGITS) is None
    assert pair_of(LOGITS, model, NO_PARTS, torch.float32) is None


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ((3.0, 2.9, 2.9), (True, False)),
        ((3.045, 3.0, 2.982), (False, False)),
        ((3.0, 3.05, 2.8), (True, True)),
        ((3.0, 3.05, 3.0), (False, False)),
        ((3.0, 3.5, 2.0), (False, False)),
    ],
    ids=[
        "no layout",
        "little by both",
        "by its layout alone",
        "not enough",
        "too slow where weights do not stay",
    ],
)
def test_both_races_count(
    model: Any, clock: dict[str, float], times: tuple[float, ...], wanted: tuple[bool, bool]
) -> None:
    clock.update(zip(("torch", "oneDNN", "its layout"), times, strict=True))
    found = chosen(model)
    assert (found.onednn, found.reorders) == wanted


def test_it_can_be_switched_off(model: Any, clock: dict[str, float]) -> None:
    for off in ({"use_onednn": False}, {"fused_lora": False}):
        found = chosen(model, **off)
        assert (found.onednn, found.why_kernels, found.left) == (False, "", ())
    assert chosen(model, fused_lora=False, use_onednn=True).left == (
        "oneDNN's products: it comes with LoRA as one operation",
    )
    nothing = dict.fromkeys(SWITCHES, False)
    assert "it comes with" in chosen(model, **nothing, use_onednn=True).left[0]


def test_what_was_timed_once_on_a_machine_is_not_timed_again(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a plan, and the training that it is for, come to the same in a close race."""
    known: dict[tuple[str, str], Any] = {}
    monkeypatch.setattr(kept, "recall", lambda *place: known.get(place))
    monkeypatch.setattr(kept, "keep", lambda kind, key, values: known.update({(kind, key): values}))
    here = (torch.device("cpu"), torch.float32, "fp32")
    assert will_reorder(model, TrainSpec(), *here)
    assert len(known) == 2
    clock["its layout"] = 4.0
    found = chosen(model)
    assert (found.onednn, found.reorders) == (True, True)
    assert with_two_threads(lambda: will_reorder(model, TrainSpec(), *here)) is False
    assert len(known) == 4


@pytest.mark.parametrize("layout", [1.6, 1.99, 2.5])
@pytest.mark.parametrize("products", [3.0, 2.05, 1.95, 1.5])
@pytest.mark.parametrize("asked", ["auto", True, False])
def test_it_is_foretold_as_it_will_be_chosen(
    model: Any, clock: dict[str, float], layout: float, products: float, asked: Any
) -> None:
    clock.update({"torch": products, "its layout": layout})
    here = (torch.device("cpu"), torch.float32, "fp32")
    spec = TrainSpec(use_onednn=asked)
    assert will_reorder(model, spec, *here) == chosen(model, use_onednn=asked).reorders


def test_small_layers_are_not_timed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are over before a clock tells much: two starts might differ."""

    def timed(_: Pair) -> None:
        raise AssertionError

    monkeypatch.setattr(product_choice, "raced_on_a_cpu", timed)
    found = chosen(model)
    assert (found.onednn, found.why_kernels, found.left) == (False, "", ())
    how = (torch.device("cpu"), torch.float32)
    assert not may_reorder(model, TrainSpec(), *how)
    assert may_reorder(model, TrainSpec(use_onednn=True), *how)
    for off in ({"use_onednn": False}, {"use_onednn": True, "fused_lora": False}):
        assert not may_reorder(model, TrainSpec(**off), *how)
    assert not may_reorder(model, TrainSpec(use_onednn=True), torch.device("cuda"), torch.float32)


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


def test_other_bits_by_its_layout_leave_that_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = raced_on_a_cpu

    def raced(pair: Pair) -> Raced:
        one = own(pair)
        return one if one.gain == 1.5 else Raced(one.gain, 1e-7)

    monkeypatch.setattr(product_choice, "raced_on_a_cpu", raced)
    found = chosen(model)
    assert (found.onednn, found.reorders) == (True, False)
    assert found.left == ()
    assert "layout" not in found.why_kernels
    found = chosen(model, use_onednn=True)
    assert (found.onednn, found.reorders) == (True, False)
    assert found.left == ("oneDNN's products with weights in its layout: other bits come out",)


def test_where_no_weight_can_stay_its_layout_is_no_question(
    model: Any, clock: dict[str, float]
) -> None:
    clock.update({"torch": 3.0, "oneDNN": 3.05, "its layout": 2.0})
    found = chosen(model, gradient_checkpointing=True)
    assert (found.onednn, found.reorders) == (False, False)
    assert "layout" not in found.why_kernels
    assert not may_reorder(
        model,
        TrainSpec(use_onednn=True, gradient_checkpointing=True),
        torch.device("cpu"),
        torch.float32,
    )


def test_a_layout_that_fails_on_the_model_leaves_the_products(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(shortcuts, "reordered", fails)
    found = chosen(model)
    assert (found.onednn, found.reorders) == (True, False)
    (why,) = found.left
    assert why.startswith("oneDNN's products with weights in its layout: ")


@pytest.mark.skipif(
    why_no_reordered(torch.device("cpu"), torch.bfloat16) is not None,
    reason="no bfloat16 in this processor",
)
def test_in_16_bits_its_layout_is_what_may_gain(model: Any, clock: dict[str, float]) -> None:
    """torch's own products are oneDNN's there."""
    found = chosen(model, "bf16")
    assert (found.onednn, found.reorders, found.left) == (False, True, ())
    assert found.why_kernels.startswith("oneDNN's layout for weights that stay (1.25 ×): ")
    clock["its layout"] = clock["oneDNN"]
    found = chosen(model, "bf16")
    assert (found.onednn, found.reorders, found.left) == (False, False, ())


def test_what_has_no_kernels_is_told_where_it_was_asked_for(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_choice, "why_no_reordered", lambda *_: "it has no kernels here")
    assert chosen(model).left == ()
    assert chosen(model, use_onednn=True).left == ("oneDNN's products: it has no kernels here",)


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


def test_its_layout_is_timed_on_weights_that_come_from_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = most_weights(model) or (0, 0)
    monkeypatch.setattr(kernel_race, "_BYTES_BEYOND_A_CACHE", 3 * 4 * height * width)
    asked: list[int] = []
    own = OneDnnProducts.product

    def noted(self: Any, left: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(id(weight))
        return own(self, left, weight, *rest)

    monkeypatch.setattr(OneDnnProducts, "product", noted)
    pair = pair_of(LAYOUT, model, NO_PARTS, torch.float32, 6)
    assert pair is not None
    for run in (pair.by_torch, pair.by_other):
        asked.clear()
        run()
        assert len(asked) == len(set(asked)) == 2 * 3
    one = raced_on_a_cpu(pair)
    assert one.apart == 0.0
    assert one.gain > 0
