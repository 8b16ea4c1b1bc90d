"""Which of Liger's kernels a run takes: those that are exact and, on this clock, faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_kit.model.fused import liger
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.liger import GATED, NORM, OPERATIONS, ROTARY
from qlora_kit.model.fused.norm import KINDS
from qlora_kit.recipe import TrainSpec
from qlora_kit.train import kernel_choice, kernel_race
from qlora_kit.train.known_shortcuts import _as_values, _from_values
from qlora_kit.train.shortcuts import Shortcuts, choose_shortcuts, taken

IDS = torch.arange(3, 23)[None]
TORCH_S, LIGER_S = 3.0, 2.0


@pytest.fixture
def model(stirred_llama: Any) -> Any:
    return stirred_llama


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """As if there were one, on which Liger takes two thirds of the time; by operation, what it
    takes otherwise.
    """
    slower: dict[str, float] = {}

    def paired(name: str, *given: Any) -> Any:
        pair = kernel_race.pair_of(name, *given, num_tokens=6)
        if pair is not None:
            clock[pair.by_torch] = TORCH_S
            clock[pair.by_other] = slower.get(name, LIGER_S)
        return pair

    clock: dict[Any, float] = {}
    monkeypatch.setattr(kernel_choice, "why_no_liger", lambda device: None)
    monkeypatch.setattr(kernel_choice, "pair_of", paired)
    monkeypatch.setattr(kernel_race, "seconds_on_a_gpu", clock.__getitem__)
    return slower


def chosen(model: Any, **train: Any) -> Shortcuts:
    return choose_shortcuts(model, TrainSpec(**train), "fp32", is_sharded=False)


def outcome(model: Any, taking: Shortcuts) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    with taken(model, taking):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    return float(loss.detach()), [
        one.grad.clone() for one in model.parameters() if one.grad is not None
    ]


def test_all_are_taken_and_a_step_is_the_same(model: Any) -> None:
    found = chosen(model)
    assert found.liger == OPERATIONS
    assert found.left == ()
    assert found.why_kernels == (
        "Liger's for norms (1.50 ×), gated MLPs (1.50 ×), rotary embeddings (1.50 ×): time of "
        "torch's over Liger's on 4,096 tokens"
    )
    loss, gradients = outcome(model, found)
    wanted, wanted_gradients = outcome(model, Shortcuts())
    assert loss == pytest.approx(wanted, rel=1e-6)
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


def test_they_are_what_computes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    own = liger._liger

    def noted(name: str) -> Any:
        names.add(name)
        return own(name)

    found = chosen(model)
    monkeypatch.setattr(liger, "_liger", noted)
    outcome(model, found)
    assert names == {"rms_norm", "utils", "swiglu", "rope"}


def test_what_is_not_faster_stays_with_torch(model: Any, gpu: dict[str, float]) -> None:
    gpu[GATED] = TORCH_S
    found = chosen(model)
    assert found.liger == (NORM, ROTARY)
    assert "; torch's own for gated MLPs (1.00 ×)" in found.why_kernels
    assert chosen(model, use_liger_kernel=True).liger == OPERATIONS


def test_they_can_be_switched_off(model: Any) -> None:
    found = chosen(model, use_liger_kernel=False)
    assert (found.liger, found.why_kernels) == ((), "")
    assert chosen(model, fused_norm=False).liger == (GATED, ROTARY)


def test_a_kernel_that_computes_something_else_is_left_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = liger.LigerGated.product

    def wrong(self: Any, *given: Any) -> torch.Tensor:
        return 1.01 * own(self, *given)

    monkeypatch.setattr(liger.LigerGated, "product", wrong)
    found = chosen(model)
    assert found.liger == (NORM, ROTARY)
    (left,) = found.left
    assert left == "Liger's kernels for gated MLPs: 0.01 of their size off"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no kernel image"), "it fails (RuntimeError: no kernel image)"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory ran out on 4,096 tokens"),
    ],
)
def test_a_kernel_that_fails_is_left_out_and_others_are_not(
    error: Exception, said: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = liger._liger

    def fails(name: str) -> Any:
        if name == "swiglu":
            raise error
        return own(name)

    monkeypatch.setattr(liger, "_liger", fails)
    found = chosen(model)
    assert found.liger == (NORM, ROTARY)
    assert found.left == (f"Liger's kernels for gated MLPs: {said}",)
    assert "gated" not in found.why_kernels


def test_norms_of_each_width_are_tried(model: Any) -> None:
    """Those of queries and keys are of each head: many short rows."""
    layer = model.get_base_model().model.layers[0].input_layernorm
    narrow = type(layer)(16).requires_grad_(False)
    model.get_base_model().model.layers[0].q_norm = narrow
    names = {name: KINDS[0] for name, one in model.named_modules() if one in (layer, narrow)}
    pair = kernel_race.pair_of(NORM, model, LeanParts(norms=names), torch.float32, num_tokens=6)
    assert pair is not None
    width = len(layer.weight)
    shapes = [tuple(one.shape) for one in pair.by_torch()]
    assert sorted(set(shapes)) == sorted({(1, 6, width), (1, 6 * width // 16, 16)})
    assert kernel_race.raced_on_a_cpu(pair).apart < 1e-5


def test_a_later_start_knows_them(model: Any) -> None:
    found = chosen(model)
    again = _from_values(_as_values(found))
    assert (again.liger, again.lean, again.why_kernels) == (
        found.liger,
        found.lean,
        found.why_kernels,
    )
