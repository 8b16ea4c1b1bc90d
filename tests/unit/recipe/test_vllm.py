"""What vLLM refuses is a fault of a recipe that exports for it, and of no other."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.errors import Fault, RecipeError
from qlora_kit.preflight import preflight
from qlora_kit.recipe import LoraSpec, recipe_from_dict
from qlora_kit.recipe.vllm import RANKS, max_lora_rank, vllm_faults

PLAIN: dict[str, Any] = {
    "model": {"name_or_path": "demo/smollm2-135m-instruct"},
    "data": {
        "train": [{"path": "demo/commands", "split": "train"}],
        "eval": [{"path": "demo/commands", "split": "test"}],
    },
    "run_dir": "runs/x",
}


def faults(**sections: Any) -> list[Fault]:
    try:
        recipe_from_dict({**PLAIN, **sections}, "recipe.yaml")
    except RecipeError as error:
        return error.faults
    return []


@pytest.mark.parametrize(
    ("lora", "path", "said"),
    [
        ({"r": 513}, "lora.r", "ranks up to 512"),
        ({"use_dora": True}, "lora.use_dora", "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save", "trained whole"),
        ({"new_tokens": ["<a>"]}, "lora.new_tokens", "rows of the embedding"),
        ({"rank_pattern": {"q_proj": 4}}, "lora.rank_pattern", "compute these wrongly"),
        ({"alpha_pattern": {"q_proj": 4}}, "lora.alpha_pattern", "compute these wrongly"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lora.target_modules", "some architectures"),
    ],
)
def test_each_is_a_fault_only_where_it_is_exported_for_vllm(
    lora: dict[str, Any], path: str, said: str
) -> None:
    (fault,) = faults(lora=lora, export={"to": ["adapter:vllm"]})
    assert fault.path == path
    assert said in fault.message
    assert faults(lora=lora, export={"to": ["adapter"]}) == []


def test_all_at_once() -> None:
    lora = {"r": 1000, "use_dora": True, "rank_pattern": {"q_proj": 4}}
    found = faults(lora=lora, export={"to": ["adapter:vllm"]})
    assert [fault.path for fault in found] == ["lora.r", "lora.use_dora", "lora.rank_pattern"]


def test_the_default_adapter_is_served_as_it_is() -> None:
    assert list(vllm_faults(LoraSpec(use_rslora=True))) == []


@pytest.mark.parametrize(
    ("r", "flag"), [(1, 1), (2, 8), (16, 16), (24, 32), (257, 320), (513, None)]
)
def test_the_rank_that_the_server_must_be_given(r: int, flag: int | None) -> None:
    assert max_lora_rank(r) == flag
    assert list(RANKS) == sorted(RANKS)


def test_targets_are_checked_before_training() -> None:
    export = {"to": ["nf4", "ggfu:Q8_0", "onnx:int4"]}
    found = preflight(recipe_from_dict({**PLAIN, "export": export}, "recipe.yaml"))
    named = {fault.path: fault.message for fault in found if fault.path.startswith("export")}
    assert list(named) == ["export.to.1", "export.to.2"]
    assert "did you mean gguf" in named["export.to.1"]


def test_an_export_needs_rows_to_be_measured_on() -> None:
    data = {"train": PLAIN["data"]["train"]}
    (fault,) = faults(data=data, evaluate={"generate": None}, export={"to": ["nf4"]})
    assert fault.path == "export.to"
    (fault,) = faults(export={"to": ["nf4", "nf4"]})
    assert fault.message == "named twice: nf4"
