"""A few layers stand for all: what a trial tells by them is what all layers tell, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig

from qlora_kit.environment import probe_hardware
from qlora_kit.model.fused.residents import Room
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan import few_layers as module
from qlora_kit.plan.few_layers import few_layers
from qlora_kit.plan.gpus import known_gpu
from qlora_kit.plan.plan import _imagined
from qlora_kit.plan.shape import Shape
from qlora_kit.plan.small_run import save_byte_tokenizer
from qlora_kit.plan.trial import ImaginedTraining, Taken
from qlora_kit.recipe import Recipe

COMMON = {"vocab_size": 320, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 1}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("llama", {**SIZES, "num_hidden_layers": 12}, (0, 1, 2, 3, 10, 11)),
    "gemma3, windows": (
        "gemma3_text",
        {
            **SIZES,
            "num_hidden_layers": 20,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 10,
        },
        (0, 1, 2, 3, 4, 5, 6, 17, 18, 19),
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 12, "n_head": 4}, (0, 1, 2, 3, 10, 11)),
}
ALL_STAY = Taken(stays=Room(10**9))
REORDERED = Taken(stays=Room(10**9, is_for_reordered=True))
FLAT, MASKED = Shape(((80, 14, 40),), 40), Shape(((70,), (70,)), 20, True)


def recipe_of(folder: Path, family: str, sizes: dict[str, Any]) -> Recipe:
    save_byte_tokenizer(folder)
    AutoConfig.for_model(family, **COMMON, **sizes).save_pretrained(folder)
    return Recipe.model_validate(
        {
            "model": {"name_or_path": str(folder)},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "run_dir": str(folder / "run"),
        }
    )


def both(folder: Path, name: str, on_gpu: bool = False) -> tuple[ImaginedTraining, Any]:
    """(by a few layers, by all)"""
    family, sizes, _ = FAMILIES[name]
    recipe = recipe_of(folder, family, sizes)
    vocabulary = load_vocabulary(recipe.model)
    hardware = known_gpu("H100") if on_gpu else probe_hardware()
    return tuple(  # type: ignore[return-value]
        _imagined(recipe, vocabulary, hardware, is_quick=is_quick) for is_quick in (True, False)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_told_is_the_same(name: str, tmp_path: Path) -> None:
    few, whole = both(tmp_path, name)
    config = few.causal.config.get_text_config()
    found = few_layers(few.model, config)
    assert found is not None
    assert found.chosen == FAMILIES[name][2]
    assert few.shortcuts == whole.shortcuts
    assert few.kept == whole.kept
    assert few.step(FLAT, Taken()) == whole.step(FLAT, Taken())
    assert few.scoring(2, 30) == whole.scoring(2, 30)
    assert few.why_all == []
    assert len(found.container) == few.num_layers, "all are there again"


def test_efforts_and_evaluation_too(tmp_path: Path) -> None:
    few, whole = both(tmp_path, "llama")
    everything = Taken(num_recomputing=few.num_layers, is_accumulated=True)
    assert few.step(MASKED, everything) == whole.step(MASKED, everything)
    assert few.step(FLAT, ALL_STAY) == whole.step(FLAT, ALL_STAY)
    assert few.step(FLAT, REORDERED) == whole.step(FLAT, REORDERED)
    assert few.effort(FLAT, few.num_layers) == whole.effort(FLAT, few.num_layers)
    assert few.held_out_loss(MASKED) == whole.held_out_loss(MASKED)
    assert few.why_all == []


@pytest.mark.parametrize(
    "how",
    [
        Taken(num_recomputing=1),
        Taken(num_recomputing=4, is_accumulated=True),
        Taken(num_recomputing=11, offloads=True),
    ],
)
def test_on_a_gpu_with_some_layers_that_recompute(how: Taken, tmp_path: Path) -> None:
    few, whole = both(tmp_path, "llama", on_gpu=True)
    assert few.step(MASKED, how) == whole.step(MASKED, how)


def test_weights_of_which_the_first_stay_are_tried_on_all_layers(tmp_path: Path) -> None:
    few, whole = both(tmp_path, "llama")
    how = Taken(stays=Room(330_000))
    assert few.step(FLAT, how) == whole.step(FLAT, how)
    assert few.why_all, "a few layers do not tell which weights stay"


def test_layers_that_turn_out_not_alike_are_all_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a difference that the look at a layer misses; here every other one has a window."""
    family, sizes, _ = FAMILIES["gemma3, windows"]
    kinds = ["sliding_attention", "full_attention"] * 6
    others = {"num_hidden_layers": 12, "layer_types": kinds}
    recipe = recipe_of(tmp_path, family, {**sizes, **others})
    vocabulary, hardware = load_vocabulary(recipe.model), probe_hardware()
    few = _imagined(recipe, vocabulary, hardware)
    whole = _imagined(recipe, vocabulary, hardware, is_quick=False)
    monkeypatch.setattr(module, "_kind_of", lambda layer: ())
    monkeypatch.setattr(module, "_lists_by_layer", lambda config, count: {})
    assert few.step(FLAT, Taken()) == whole.step(FLAT, Taken())
    assert "do not take the same" in few.why_all[0]


def test_where_there_is_little_to_spare_all_are_gone_through(tmp_path: Path) -> None:
    family, sizes, _ = FAMILIES["llama"]
    recipe = recipe_of(tmp_path, family, {**sizes, "num_hidden_layers": 11})
    imagined = _imagined(recipe, load_vocabulary(recipe.model), probe_hardware())
    assert few_layers(imagined.model, imagined.causal.config.get_text_config()) is None
    assert few_layers(nn.Linear(2, 2), imagined.causal.config) is None
