"""Whether attention goes in blocks: where it is faster by this clock, and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_kit.model import blockwise_attention
from qlora_kit.model.blockwise_attention import FEWEST_TOKENS
from qlora_kit.model.fused.lean import NO_PARTS
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import kernel_choice, kernel_race
from qlora_kit.train.kernel_race import ATTENTION, Pair, pair_of, raced_on_a_cpu
from qlora_kit.train.shortcuts import SWITCHES, Shortcuts, choose_shortcuts

NOTHING = dict.fromkeys(SWITCHES, False)


@pytest.fixture
def model(adapted_llama: Any) -> Any:
    return adapted_llama


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """By which each side takes so many seconds."""
    takes = {"torch": 3.0, "blocks": 2.0}
    sides: dict[Any, str] = {}

    def paired(*given: Any) -> Pair | None:
        pair = pair_of(*given)
        if pair is not None:
            sides.update({pair.by_torch: "torch", pair.by_other: "blocks"})
        return pair

    monkeypatch.setattr(kernel_choice, "pair_of", paired)
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
        "in blocks for attention (1.50 ×): time of torch's over that of blocks on 192 tokens"
    )
    assert found.left == ()


def test_they_stand_beside_other_kernels(model: Any, clock: dict[str, float]) -> None:
    found = chosen(model, use_onednn=True)
    assert (found.onednn, found.blockwise) == (True, True)
    first, second = found.why_kernels.split("; ")
    assert first.startswith("oneDNN's for products")
    assert second.startswith("in blocks for attention")


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


@pytest.mark.parametrize(
    ("longest", "why"),
    [
        (0, "examples are not attended to by themselves"),
        (FEWEST_TOKENS - 1, "no row has 192 tokens, the longest 191"),
    ],
)
def test_what_they_do_not_cover_is_told_where_they_were_asked_for(
    model: Any, clock: dict[str, float], longest: int, why: str
) -> None:
    assert chosen(model, longest=longest).left == ()
    found = chosen(model, longest=longest, blockwise_attention=True)
    assert (found.blockwise, found.left) == (False, (f"attention in blocks: {why}",))


def test_in_float16_they_are_not_taken(model: Any, clock: dict[str, float]) -> None:
    assert chosen(model, "fp16", **NOTHING).left == ()
    (why,) = chosen(model, "fp16", blockwise_attention=True, **NOTHING).left
    assert why == "attention in blocks: it is not for torch.float16"


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_those_that_come_out_otherwise_are_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    own = blockwise_attention.attend
    monkeypatch.setattr(blockwise_attention, "attend", lambda *given: factor * own(*given))
    found = chosen(model)
    assert not found.blockwise
    (why,) = found.left
    assert why.startswith("attention in blocks: ")
    assert why.endswith("of their size off")
    assert found.fusion is not None, "all else is as good as before"


def test_what_fails_is_left_out(
    model: Any, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(blockwise_attention, "attend", fails)
    assert chosen(model).left == ("attention in blocks: it fails (RuntimeError: no such product)",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_timed_on_the_heads_of_the_model(model: Any, dtype: torch.dtype) -> None:
    pair = pair_of(ATTENTION, model, NO_PARTS, dtype)
    assert pair is not None
    config = model.config
    num, num_keys = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // num
    assert [tuple(one.shape) for one in pair.by_other()] == [
        (1, FEWEST_TOKENS, num, width),
        (1, num, FEWEST_TOKENS, width),
        *[(1, num_keys, FEWEST_TOKENS, width)] * 2,
    ]
    one = raced_on_a_cpu(pair)
    assert one.apart < (1e-5 if dtype == torch.float32 else 2e-2)
    assert one.gain > 0
