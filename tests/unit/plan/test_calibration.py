"""What a machine was measured to do: kept for its like alone, and what a plan tells by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_kit.environment import Hardware
from qlora_kit.errors import HardwareError
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan import calibration
from qlora_kit.plan.calibration import Calibration, calibrate, recalled
from qlora_kit.plan.effort import Effort
from qlora_kit.plan.plan import Planner, framework_bytes
from qlora_kit.plan.rows import train_rows
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.report import plan as report
from qlora_kit.report.reporter import Reporter

_GIB = 2**30
_MACHINE = Hardware(
    device="cpu",
    device_name="a processor",
    num_devices=0,
    device_memory_bytes=None,
    num_cpus=2,
    host_memory_bytes=8 * _GIB,
    native_bf16=False,
    native_fp16=False,
    native_tf32=False,
    reason="a test",
)
_PEAK_BYTES, _TENSOR_BYTES = 900, 200
_EFFORT = Effort(products=10**9, moved_bytes=10**8, num_operations=1000)
_PRODUCTS, _BYTES, _OPERATION = 1e9, 1e9, 1e-3  # so that it takes 1 + 0.1 + 1 seconds
_STEP_SECONDS = 4.2


class Heard(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and the training run are as they are told here."""
    monkeypatch.setattr(calibration, "_products_per_second", lambda *_: _PRODUCTS)
    monkeypatch.setattr(calibration, "_bytes_per_second", lambda *_: _BYTES)
    monkeypatch.setattr(calibration, "_seconds_per_operation", lambda *_: _OPERATION)
    monkeypatch.setattr(calibration, "small_recipe", lambda *_: None)
    monkeypatch.setattr(calibration, "_trained", lambda *_: (_PEAK_BYTES, _STEP_SECONDS))


def planned(_: object) -> tuple[Any, Effort]:
    """What the small model is planned to need."""
    moment = SimpleNamespace(bytes_beside_framework=_TENSOR_BYTES)
    return SimpleNamespace(moment=lambda _: moment), _EFFORT


def the_record(cache: Path) -> Path:
    (path,) = (cache / "calibration").iterdir()
    return path


def test_without_a_calibration_what_the_process_holds_counts_on_a_cpu() -> None:
    held = 700 * 2**20
    little = 100 * 2**20
    assert held < framework_bytes(_MACHINE, None, held) < held + little
    on_gpu = replace(_MACHINE, device="cuda")
    assert framework_bytes(on_gpu, None, held) == framework_bytes(on_gpu, None, 2 * held)
    known = Calibration(_PEAK_BYTES, _PRODUCTS, _BYTES, _OPERATION)
    assert framework_bytes(_MACHINE, known, held) == _PEAK_BYTES


class TestKept:
    def test_rates_are_held_against_a_training_run(self) -> None:
        found = calibrate(_MACHINE, "fp32", planned)
        framework = _PEAK_BYTES - _TENSOR_BYTES
        rates = Calibration(framework, _PRODUCTS, _BYTES, _OPERATION)
        assert replace(found, factor=1.0) == rates
        assert found.factor == pytest.approx(2)
        assert found.seconds(_EFFORT) == pytest.approx(_STEP_SECONDS)
        twice = Effort(2 * 10**9, 2 * 10**8, 2000)
        assert found.seconds(twice) == pytest.approx(2 * _STEP_SECONDS)

    def test_it_is_recalled_as_it_was_found(self) -> None:
        assert recalled(_MACHINE, "fp32") is None
        found = calibrate(_MACHINE, "fp32", planned)
        assert recalled(_MACHINE, "fp32") == found

    def test_not_for_another_machine_or_precision(self) -> None:
        calibrate(_MACHINE, "fp32", planned)
        assert recalled(replace(_MACHINE, device_name="another"), "fp32") is None
        assert recalled(_MACHINE, "bf16") is None

    def test_by_whatever_name_the_machine_goes(self) -> None:
        card = replace(_MACHINE, device_name="NVIDIA GeForce RTX 4090")
        found = calibrate(card, "fp32", planned)
        assert recalled(replace(_MACHINE, device_name="RTX 4090"), "fp32") == found

    def test_not_for_a_process_that_imports_otherwise(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "is_lean", lambda: True)
        found = calibrate(_MACHINE, "fp32", planned)
        assert recalled(_MACHINE, "fp32") == found
        monkeypatch.setattr(calibration, "is_lean", lambda: False)
        assert recalled(_MACHINE, "fp32") is None

    def test_not_for_another_number_of_threads(self) -> None:
        found = calibrate(_MACHINE, "fp32", planned)
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        try:
            assert recalled(_MACHINE, "fp32") is None
        finally:
            torch.set_num_threads(before)
        assert recalled(_MACHINE, "fp32") == found

    def test_not_for_other_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calibrate(_MACHINE, "fp32", planned)
        monkeypatch.setattr(calibration, "package_versions", lambda: {"torch": "9.0"})
        assert recalled(_MACHINE, "fp32") is None

    def test_not_where_something_else_is_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calibrate(_MACHINE, "fp32", planned)
        monkeypatch.setattr(calibration, "_METHOD", calibration._METHOD + 1)
        assert recalled(_MACHINE, "fp32") is None

    def test_a_damaged_record_is_measured_anew(self, cache: Path) -> None:
        found = calibrate(_MACHINE, "fp32", planned)
        path = the_record(cache)
        path.write_bytes(path.read_bytes().replace(b"1000000000", b"9000000000", 1))
        assert recalled(_MACHINE, "fp32") is None
        assert calibrate(_MACHINE, "fp32", planned) == found
        assert recalled(_MACHINE, "fp32") == found
        assert the_record(cache) == path

    def test_a_training_run_that_fails_keeps_nothing(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise HardwareError("the training run that calibrates failed")

        monkeypatch.setattr(calibration, "_trained", fail)
        with pytest.raises(HardwareError):
            calibrate(_MACHINE, "fp32", planned)
        assert not (cache / "calibration").exists()


def recipe_for(folder: Path, model: Path, *overrides: str) -> Recipe:
    rows = [{"prompt": "paint it", "completion": "red " * (1 + n)} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    values = {
        "model": {"name_or_path": str(model)},
        "quantization": {"compute_dtype": "float32"},
        "data": {"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2,
        },
        "run_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(values))
    return load_recipe(folder / "recipe.yaml", overrides)


@pytest.fixture(scope="module")
def planner(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    recipe = recipe_for(tmp_path_factory.mktemp("planner"), tiny_llama)
    return Planner(load_vocabulary(recipe.model), _MACHINE, 8 * _GIB)


def line_about_speed(planner: Planner, recipe: Recipe, has_rows: bool) -> str:
    heard = Heard()
    train = train_rows(recipe, planner.vocabulary) if has_rows else None
    report.plan(heard, planner.plan(recipe, train), has_rows)
    (line,) = [one for one in heard.lines if one.startswith("speed ")]
    return line


class TestAPlan:
    @pytest.mark.parametrize("has_rows", [False, True])
    def test_without_a_calibration_tells_how_to_get_one(
        self, planner: Planner, tmp_path: Path, tiny_llama: Path, has_rows: bool
    ) -> None:
        recipe = recipe_for(tmp_path, tiny_llama, "train.max_steps=10")
        line = line_about_speed(planner, recipe, has_rows)
        assert line == (
            f"speed     not known: no calibration of {planner.hardware.device_name} is here; "
            "plan RECIPE --calibrate makes one on the machine itself"
        )

    def test_with_a_damaged_one_tells_the_same(
        self, planner: Planner, tmp_path: Path, tiny_llama: Path, cache: Path
    ) -> None:
        calibrate(_MACHINE, "fp32", planned)
        the_record(cache).write_text("{}")
        recipe = recipe_for(tmp_path, tiny_llama)
        assert "not known" in line_about_speed(planner, recipe, False)

    def test_with_one_tells_tokens_a_second(
        self, planner: Planner, tmp_path: Path, tiny_llama: Path
    ) -> None:
        found = calibrate(_MACHINE, "fp32", planned)
        recipe = recipe_for(tmp_path, tiny_llama)
        plan = planner.plan(recipe)
        way = plan.choice.way
        shape = plan.worst.first(way.at_a_time)
        effort = planner._model_of(recipe).effort(shape, way.num_recomputing)
        assert plan.tokens_per_second == pytest.approx(2 * 64 / found.seconds(effort))
        line = line_about_speed(planner, recipe, False)
        assert line == f"speed     {plan.tokens_per_second:,.0f} tokens a second"

    def test_takes_what_a_process_needs_from_it(
        self, planner: Planner, tmp_path: Path, tiny_llama: Path
    ) -> None:
        recipe = recipe_for(tmp_path, tiny_llama)
        calibrate(_MACHINE, "fp32", planned)
        components = planner.plan(recipe).moment("training").components
        assert components["framework"] == _PEAK_BYTES - _TENSOR_BYTES

    def test_tells_hours_where_it_knows_how_many_updates_there_are(
        self, planner: Planner, tmp_path: Path, tiny_llama: Path
    ) -> None:
        calibrate(_MACHINE, "fp32", planned)
        by_rows = recipe_for(tmp_path, tiny_llama)
        by_steps = recipe_for(tmp_path, tiny_llama, "train.max_steps=5000")
        assert "hours" not in line_about_speed(planner, by_rows, False)
        assert "hours of training" in line_about_speed(planner, by_rows, True)
        assert "hours of training" in line_about_speed(planner, by_steps, False)

        train = train_rows(by_rows, planner.vocabulary)
        num_tokens = sum(len(one.input_ids) for one in train.sequences)
        plan = planner.plan(by_rows, train)
        assert plan.tokens_per_second is not None
        assert plan.seconds == pytest.approx(2 * num_tokens / plan.tokens_per_second)
        plan = planner.plan(by_steps)
        assert plan.tokens_per_second is not None
        assert plan.seconds == pytest.approx(5000 * 3 * 2 * 64 / plan.tokens_per_second)
