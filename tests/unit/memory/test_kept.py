"""What a forward pass is counted to keep, and what follows for other lengths."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.memory.kept import Growth, Kept, measure_kept
from qlora_kit.train.recompute import able_to_recompute


def test_a_parabola_through_three_points() -> None:
    growth = Growth.through((16, 32, 64), [5 + 3 * n + 2 * n * n for n in (16, 32, 64)])
    assert growth.at(1000) == pytest.approx(5 + 3 * 1000 + 2 * 1000**2)


def kept(layer: float = 100, given: float = 10, rest: float = 7, count: int = 4) -> Kept:
    def linear(slope: float) -> Growth:
        return Growth(0, slope, 0)

    return Kept((linear(layer),) * count, linear(given), linear(rest))


class TestPeak:
    """Four layers that keep 100 bytes a token each, beside inputs of 10 and a rest of 7."""

    def test_without_recomputing_all_is_kept(self) -> None:
        assert kept().peak_bytes(0, (50, 50)) == 2 * 50 * (400 + 7)

    def test_with_all_recomputing_one_layer_is_at_work(self) -> None:
        assert kept().peak_bytes(4, (50, 50)) == 2 * 50 * (4 * 10 + 100 + 7)

    def test_no_more_recompute_than_have_to(self) -> None:
        one = kept()
        for count in range(5):
            free = one.peak_bytes(count, (50, 50))
            fewest = one.fewest((50, 50), free)
            assert one.peak_bytes(fewest, (50, 50)) <= free
            assert fewest <= count
        assert one.fewest((50, 50), 1) == 4, "all, where nothing fits"


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.requires_grad_(False)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()


def saved_bytes(model: Any, length: int) -> int:
    """Of every storage that autograd keeps, counted apart from the code under test."""
    owned = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        loss_of(model, length)
    return sum(one.untyped_storage().nbytes() for one in held.values())


def loss_of(model: Any, length: int) -> torch.Tensor:
    ids = torch.arange(length)[None] % 300
    labels = ids.masked_fill(torch.arange(length) < length - 2, -100)
    loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_predicted_for_a_longer_sequence_is_kept(model: Any, attention: str) -> None:
    """With eager attention, whose scores grow with the square of the length, too."""
    model.get_base_model().set_attn_implementation(attention)
    with able_to_recompute(model):
        found = measure_kept(model, lambda length: loss_of(model, length))
    assert (found.layers[1].square > 1) == (attention == "eager")
    wanted = saved_bytes(model, 200)
    assert found.peak_bytes(0, (200,)) == pytest.approx(wanted, rel=0.02)


def test_what_was_counted_is_let_go(model: Any) -> None:
    """Autograd's own references are in no cycle that a collector finds."""
    outputs: list[weakref.ref[torch.Tensor]] = []
    model.get_base_model().model.layers[0].register_forward_hook(
        lambda *given: outputs.append(weakref.ref(given[2]))
    )
    with able_to_recompute(model):
        measure_kept(model, lambda length: loss_of(model, length))
    gc.collect()
    assert [one() for one in outputs] == [None] * 3
