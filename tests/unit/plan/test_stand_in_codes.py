"""What a plan says of training that quantizes what it trains, beside what is alive in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from conftest import build_llama

from qlora_kit.environment import probe_hardware
from qlora_kit.memory.live import LiveTensors
from qlora_kit.model.qat import nf4
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.numberless import Numberless
from qlora_kit.plan.plan import Plan, Planner
from qlora_kit.plan.rows import train_rows
from qlora_kit.plan.stand_in_codes import CODES, quantizing_without_numbers
from qlora_kit.recipe import Recipe

from ..model.zoo import DENSE, build
from .test_trial import recipe_for, told_and_taken

WHOLE = {"load_in_4bit": False, "compute_dtype": "float32"}
_GIB = 2**30


def aware_recipe(folder: Path, model: Path, **spec: Any) -> Recipe:
    recipe = recipe_for(folder, model, quantization=WHOLE, train={"optim": "adamw_torch"})
    values = {**recipe.model_dump(), "quantization_aware": {"method": "nf4", **spec}}
    if spec.get("train") == "full":
        values["lora"] = {}
    return Recipe.model_validate(values)


def plan_of(recipe: Recipe) -> Plan:
    vocabulary = load_vocabulary(recipe.model)
    planner = Planner(vocabulary, probe_hardware(), 8 * _GIB)
    return planner.plan(recipe, train_rows(recipe, vocabulary))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose weights are larger than all that passes between its layers."""
    folder = tmp_path_factory.mktemp("wide")
    return build_llama(folder, hidden_size=512, intermediate_size=1024)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("train", ["adapter", "full"])
@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"double_quant": False},
        {"method": "int8"},
        {"method": "int4-group"},
        {"skip_modules": ["down_proj"]},
    ],
    ids=["nf4", "nf4 once", "int8", "int4-group", "not all"],
)
def test_a_trial_says_what_a_step_takes(
    spec: dict[str, Any],
    train: str,
    count: int,
    wide_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the second update on, when all that is trained is quantized anew."""
    recipe = aware_recipe(tmp_path, wide_llama, train=train, **spec)
    told, taken = told_and_taken(recipe, count, monkeypatch)
    assert told == pytest.approx(taken, rel=0.02)


@pytest.mark.parametrize("train", ["adapter", "full"])
def test_layers_that_hold_their_weights_the_other_way_round(
    train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, values = DENSE["gpt2: Conv1D, tied"]
    recipe = aware_recipe(tmp_path, build(tmp_path / "gpt2", kind, values), train=train)
    told, taken = told_and_taken(recipe, 0, monkeypatch)
    assert told == pytest.approx(taken, rel=0.02)


def test_the_copies_are_told_apart(tiny_llama: Path, tmp_path: Path) -> None:
    """Half a byte for each weight and a scale for 64 of them, with what each is made of."""
    plan = plan_of(aware_recipe(tmp_path, tiny_llama, double_quant=False))
    assert CODES not in plan.moment("loading").components
    config = load_config(tiny_llama)
    model = build_skeleton(config).model
    weights = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    training = plan.moment("training").components
    codes = sum(weights) * (0.5 + 4 / 64) + 4 * 16 * len(weights)  # a table for each
    assert training[CODES] == codes + training["adapter"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_quantizes_without_what_a_cpu_makes_on_the_way(device: str) -> None:
    """On both the codes and scales are of the same size as real ones."""
    scheme = nf4.Nf4(64, double_quant=True)
    real = scheme.quantize(torch.randn(64, 128))
    live = LiveTensors()
    with Numberless(), quantizing_without_numbers(device):
        weight = torch.empty(64, 128)
        with live:
            codes = scheme.quantize(weight)
            peak = sum(live.peak.values())
            sizes = [one.nbytes for one in codes.tensors()]
    assert sizes == [one.nbytes for one in real.tensors()]
    assert (peak > weight.nbytes) == (device == "cpu")


def test_nothing_without_numbers_is_left_behind(tiny_llama: Path, tmp_path: Path) -> None:
    plan_of(aware_recipe(tmp_path, tiny_llama))
    assert all(type(one) is torch.Tensor for one in functional.name2qmap.values())
    assert all(type(one) is torch.Tensor for one in nf4.tables())
