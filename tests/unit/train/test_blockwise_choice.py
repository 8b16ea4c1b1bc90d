"""Whether attention goes in blocks: where it is faster by this clock, and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_kit.model import blockwise_attention
from qlora_kit.model.blockwise_attention import FEWEST_TOKENS
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import kernel_choice, kernel_race, product_choice
from qlora_kit.train.kernel_race import Pair, Raced, attention_pair, raced_on_a_cpu
from qlora_kit.train.shortcuts import SWITCHES, Shortcuts, choose_shortcuts

from .left_out import require_left_out_where_it_fails, require_left_out_where_off

NOTHING = dict.fromkeys(SWITCHES, False)


@pytest.fixture
def model(adapted_llama: Any) -> Any:
    return adapted_llama


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By which each side takes so many seconds."""
    takes = {"torch": 3.0, "blocks": 2.0}
    sides: dict[Any, str] = {}

    def beside(*given: Any) -> Pair:
        pair = attention_pair(*given)
        sides.update({pair.by_torch: "torch", pair.by_other: "blocks"})
        return pair

    monkeypatch.setattr(kernel_choice, "attention_pair", beside)
    monkeypatch.setattr(product_choice, "FEWEST_WEIGHTS", 1 << 30)  # no race of products
    monkeypatch.setattr(kernel_race, "seconds_on_a_cpu", lambda run: takes[sides[run]])
    return takes


def chosen(
    model: Any, precision: str = "fp32", longest: int = FEWEST_TOKENS, **train: Any
) -> Shortcuts:
    return choose_shortcuts(model, TrainSpec(**train), precision, False, longest)


@pytest.mark.parametrize("others", [{}, NOTHING])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_are_taken_where_they_are_faster(
    model: Any, clock: dict[str, float], precision: str, others: dict[str, Any]
) -> None:
    found = chosen(model, precision, **others)
    assert found.blockwise
    assert found.why_kernels == (
        "blocks of queries for attention (1.50 ×): time of torch's over that of blocks on 192 "
        "tokens"
    )
    assert found.left == ()


def test_they_stand_beside_other_kernels(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (kernel_choice, product_choice):
        monkeypatch.setattr(module, "raced_on_a_cpu", lambda pair: Raced(gain=1.5, apart=0.0))
    found = chosen(model, use_onednn=True)
    assert (found.onednn, found.blockwise) == (True, True)
    first, second = found.why_kernels.split("; ")
    assert first.startswith("oneDNN's for products")
    assert second.startswith("blocks of queries for attention")


@pytest.mark.parametrize(
    ("longest", "timed"), [(192, 192), (255, 192), (300, 256), (511, 384), (2048, 512)]
)
def test_they_are_timed_on_about_the_longest_example(
    model: Any, clock: dict[str, float], longest: int, timed: int
) -> None:
    """But on no more than tell in a moment."""
    assert chosen(model, longest=longest).why_kernels.endswith(f" {timed} tokens")


def test_they_are_left_where_they_are_not_faster(model: Any, clock: dict[str, float]) -> None:
    clock["blocks"] = clock["torch"]
    found = chosen(model)
    assert not found.blockwise
    assert found.why_kernels.startswith("torch's own for attention (1.00 ×)")
    assert found.left == ()
    assert chosen(model, blockwise_attention=True).blockwise


def test_they_can_be_switched_off(model: Any, clock: dict[str, float]) -> None:
    found = chosen(model, blockwise_attention=False)
    assert (found.blockwise, found.why_kernels, found.left) == (False, "", ())


@pytest.mark.parametrize("longest", [0, FEWEST_TOKENS - 1])
@pytest.mark.parametrize(("precision", "most"), [("fp32", "2,048"), ("bf16", "768")])
def test_what_they_do_not_cover_is_told_where_they_were_asked_for(
    model: Any, clock: dict[str, float], longest: int, precision: str, most: str
) -> None:
    assert chosen(model, precision, longest).left == ()
    found = chosen(model, precision, longest, blockwise_attention=True)
    assert not found.blockwise
    assert found.left == (
        f"attention in blocks: no example of 192 to {most} tokens is attended to by itself "
        "(data.padding_free, data.packing)",
    )


def test_attention_with_dropout_is_left_alone(model: Any, clock: dict[str, float]) -> None:
    model.config.attention_dropout = 0.1
    assert not chosen(model).blockwise
    (why,) = chosen(model, blockwise_attention=True).left
    assert why == "attention in blocks: the model drops out of its attention at random"


def test_on_several_gpus_what_was_asked_for_is_told(model: Any) -> None:
    for asked in ({"blockwise_attention": True}, {"use_onednn": True}):
        spec = TrainSpec(**NOTHING, **asked)
        (why,) = choose_shortcuts(model, spec, "fp32", True, FEWEST_TOKENS).left
        assert why == "the model is shared out over several GPUs"
    assert choose_shortcuts(model, TrainSpec(**NOTHING), "fp32", True).left == ()


def test_in_float16_they_are_not_taken(model: Any, clock: dict[str, float]) -> None:
    assert chosen(model, "fp16", **NOTHING).left == ()
    (why,) = chosen(model, "fp16", blockwise_attention=True, **NOTHING).left
    assert why == "attention in blocks: they are not for torch.float16"


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_those_that_come_out_otherwise_are_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    found = require_left_out_where_off(
        monkeypatch,
        (blockwise_attention, "attend"),
        factor,
        lambda: chosen(model),
        "attention in blocks",
    )
    assert not found.blockwise


def test_what_fails_is_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_left_out_where_it_fails(
        monkeypatch, (blockwise_attention, "attend"), lambda: chosen(model), "attention in blocks"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_timed_on_the_heads_of_the_model(
    model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Pair] = []
    monkeypatch.setattr(
        kernel_choice, "raced_on_a_cpu", lambda pair: seen.append(pair) or Raced(2.0, 0.0)
    )
    assert chosen(model, "fp32" if dtype == torch.float32 else "bf16", **NOTHING).blockwise
    (pair,) = seen
    config = model.config
    num, num_keys = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // num
    assert [tuple(one.shape) for one in pair.by_other()] == [
        (1, FEWEST_TOKENS, num, width),
        (1, num, FEWEST_TOKENS, width),
        *[(1, num_keys, FEWEST_TOKENS, width)] * 2,
    ]
    assert all(one.dtype == dtype for one in pair.by_other())
    assert raced_on_a_cpu(pair).apart < (1e-5 if dtype == torch.float32 else 2e-2)
