"""What a run leaves for people and trackers: where it ran, and TensorBoard's curves."""

from __future__ import annotations

import json
import platform
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from qlora_kit.recipe import load_recipe, recipe_hash
from qlora_kit.versions import REPORTED_PACKAGES, package_versions

from .conftest import ROOT, Call, FinishedRun, write_recipe


def test_environment_says_where_and_with_what_it_ran(finished: FinishedRun) -> None:
    recipe = load_recipe(finished.folder / "recipe.yaml")
    environment = json.loads((finished.folder / "environment.json").read_text())
    assert set(environment) == {
        "started",
        "recipe_sha256",
        "seed",
        "python",
        "platform",
        "packages",
        "qlora_kit",
        "git_commit",
        "hardware",
    }
    assert environment["packages"] == package_versions()
    assert set(environment["packages"]) == set(REPORTED_PACKAGES)
    assert environment["python"] == platform.python_version()
    assert environment["qlora_kit"]
    assert environment["seed"] == recipe.train.seed
    assert environment["recipe_sha256"] == recipe_hash(recipe)
    assert environment["hardware"]["device_name"]
    assert environment["hardware"]["host_memory_bytes"] > 2**28
    assert environment["hardware"]["reason"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", environment["started"])


def test_the_commit_is_that_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.versions import describe

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe()["git_commit"] is None
    if not (ROOT / ".git").exists():
        pytest.skip("the kit's own folder is no clone")
    monkeypatch.chdir(ROOT)
    assert re.fullmatch(r"[0-9a-f]{40}\+?", describe()["git_commit"])


def test_tensorboard_writes_into_the_run_and_nowhere_else(
    tmp_path: Path, tiny_llama: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = write_recipe(tmp_path / "here", tiny_llama)
    before = sorted(tmp_path.rglob("*"))
    said = call(
        "train",
        str(recipe),
        "train.report_to=[tensorboard]",
        "train.max_steps=3",
        "train.logging_steps=1",
        "evaluate.generate=null",
        "export.merge=false",
    )
    assert said.code == 0, said.err
    run = tmp_path / "here" / "run"
    new = [path for path in tmp_path.rglob("*") if path not in before]
    assert all(path == run or path.is_relative_to(run) for path in new)
    (events,) = run.rglob("events.out.tfevents.*")
    curves = EventAccumulator(str(events)).Reload()
    losses = [point.value for point in curves.Scalars("train/loss")]
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss"] for line in logged if "loss" in line])
    assert len(losses) == 3


def test_no_tracker_is_written_to_unasked(finished: FinishedRun) -> None:
    assert not list(finished.folder.rglob("events.out.tfevents.*"))
    assert load_recipe(finished.recipe).train.report_to == ()
