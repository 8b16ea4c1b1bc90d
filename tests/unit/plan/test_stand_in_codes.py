"""What a plan says of training that quantizes what it trains, beside what is alive in a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from conftest import build_llama

from qlora_kit.environment import probe_hardware
from qlora_kit.errors import ModelError
from qlora_kit.memory.kept import Kept, measure_kept
from qlora_kit.memory.live import LiveTensors
from qlora_kit.model.qat import nf4
from qlora_kit.model.qat.nf4 import Nf4
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.numberless import Numberless
from qlora_kit.plan.plan import Plan, Planner
from qlora_kit.plan.rows import train_rows
from qlora_kit.plan.shape import Shape
from qlora_kit.plan.stand_in_codes import CODES, ImaginedNf4
from qlora_kit.processes import ALONE
from qlora_kit.recipe import Recipe
from qlora_kit.report.reporter import SILENT
from qlora_kit.stages.prepare import prepare
from qlora_kit.train.loss_of_length import loss_of_length

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
    real = Nf4(64, double_quant=True).quantize(torch.randn(64, 128))
    live = LiveTensors()
    with Numberless():
        weight = torch.empty(64, 128)
        with live:
            codes = ImaginedNf4(64, True, device).quantize(weight)
            peak = sum(live.peak.values())
            sizes = [one.nbytes for one in codes.tensors()]
    assert sizes == [one.nbytes for one in real.tensors()]
    assert (peak > weight.nbytes) == (device == "cpu")


def test_nothing_without_numbers_is_left_behind(tiny_llama: Path, tmp_path: Path) -> None:
    plan_of(aware_recipe(tmp_path, tiny_llama))
    assert all(type(one) is torch.Tensor for one in functional.name2qmap.values())
    assert all(type(one) is torch.Tensor for one in nf4._tables())


@pytest.mark.parametrize("train", ["adapter", "full"])
def test_what_passes_keep_does_not_depend_on_what_was_asked_before(
    train: str, wide_llama: Path, tmp_path: Path
) -> None:
    """Else what is quantized anew counts as kept, by the shortest sequence alone."""
    recipe = aware_recipe(tmp_path, wide_llama, train=train)
    planner = Planner(load_vocabulary(recipe.model), probe_hardware(), 8 * _GIB)
    first, then = planner._model_of(recipe), planner._model_of(recipe.model_copy())
    wanted = first.kept
    del then.__dict__["kept"]
    assert sum(then.standing.values()) > 0
    assert then.kept == wanted


@pytest.mark.parametrize("train", ["adapter", "full"])
def test_a_budget_that_fits_is_met_as_training_meets_it(
    train: str, wide_llama: Path, tmp_path: Path
) -> None:
    recipe = aware_recipe(tmp_path, wide_llama, train=train)
    needed = plan_of(recipe).moment("training").num_bytes
    budget = f"{int(1.3 * needed / 2**20)}MiB"  # whatever the process of the tests has taken before
    tight = recipe.train.model_copy(update={"memory_budget": budget})
    plan = plan_of(recipe.model_copy(update={"train": tight}))
    assert plan.choice.way.at_a_time == 4
    assert plan.choice.way.num_recomputing == 0


def test_real_passes_are_counted_without_what_the_first_quantizes(
    wide_llama: Path, tmp_path: Path
) -> None:
    """As where all is known from a checkpoint, and nothing was tried."""
    recipe = aware_recipe(tmp_path, wide_llama)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    around: Any = SimpleNamespace(precision="fp32")
    collator = ready.batches.collator

    def counted() -> Kept:
        model = ready.adapted.model
        return measure_kept(model, lambda n: loss_of_length(model, collator, n, around))

    assert counted() == counted()


def test_quantizing_is_shared_by_the_micro_batches_of_an_update(
    wide_llama: Path, tmp_path: Path
) -> None:
    recipe = aware_recipe(tmp_path, wide_llama)
    imagined = Planner(load_vocabulary(recipe.model), probe_hardware(), _GIB)._model_of(recipe)
    shape = Shape(((32,),), 16)
    alone, shared = imagined.effort(shape, 0), imagined.effort(shape, 0, 4)
    quantizing = alone.moved_bytes - shared.moved_bytes
    assert quantizing > 0
    assert shared.moved_bytes - quantizing / 3 == pytest.approx(
        imagined.effort(shape, 0, 10**9).moved_bytes, rel=1e-6
    )


def test_what_training_refuses_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nonsense is neither the start nor the end"):
        plan_of(aware_recipe(tmp_path, tiny_llama, skip_modules=["nonsense"]))
