"""Room on the disk is asked for before the work, and for as much as the work writes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_kit import run as run_module
from qlora_kit.errors import HardwareError
from qlora_kit.evaluate.divergence import DEFAULT_MAX_TOKENS
from qlora_kit.export.shards import SURROUNDINGS_BYTES
from qlora_kit.recipe import Recipe, load_recipe

from .conftest import FinishedRun, write_recipe


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int


def test_no_room_on_the_disk(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked before anything is written, and trained or merged."""
    recipe = load_recipe(write_recipe(tmp_path, tiny_llama))
    before = sorted(tmp_path.rglob("*"))

    def too_late(*_: Any, **__: Any) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(1 << 40, 1 << 40, 100_000))
    monkeypatch.setattr(run_module, "train_adapter", too_late)
    with pytest.raises(HardwareError, match=r"for this run: .* 100,000 free") as error:
        run_module.run_recipe(recipe)
    assert str(tmp_path) in str(error.value)
    assert "make room" in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("merge", [True, False])
def test_room_that_a_run_needs_is_what_it_writes(
    tmp_path: Path, finished: FinishedRun, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    """What is asked for covers what a finished run of this recipe holds in weights."""
    asked: list[int] = []
    recipe = load_recipe(finished.recipe)
    export = recipe.export.model_copy(update={"merge": merge})
    recipe = recipe.model_copy(update={"export": export, "run_dir": str(tmp_path / "run")})

    class Stop(Exception):
        pass

    def note(_: Path, num_bytes: int, __: str) -> None:
        asked.append(num_bytes)
        raise Stop

    monkeypatch.setattr("qlora_kit.stages.folder.require_disk", note)
    with pytest.raises(Stop):
        run_module.run_recipe(recipe)
    written = ["adapter", "merged"] if merge else ["adapter"]
    weights = [path for name in written for path in (finished.folder / name).glob("*.safetensors")]
    assert len(weights) == len(written)
    vocabulary, weighed = 384, sum(path.stat().st_size for path in weights)
    most = 4 * vocabulary * DEFAULT_MAX_TOKENS  # what the trained graph said, were there many rows
    scratch = SURROUNDINGS_BYTES if merge else 0
    assert 0.9 * weighed <= asked[0] - scratch <= 10 * weighed < most + weighed


class SmallDisk:
    """A disk of `size_bytes` that holds one run folder and nothing else."""

    def __init__(self, folder: Path, size_bytes: int):
        self.folder, self.size_bytes = folder, size_bytes

    def usage(self, _: Path) -> DiskUsage:
        used = sum(one.stat().st_size for one in self.folder.rglob("*") if one.is_file())
        return DiskUsage(self.size_bytes, used, self.size_bytes - used)


@pytest.fixture
def unended(tmp_path: Path, finished: FinishedRun) -> Recipe:
    """A run that was killed when it had merged, before its summary."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()
    return load_recipe(finished.recipe).model_copy(update={"run_dir": str(folder)})


def asked(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a run of this recipe asks for."""
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: DiskUsage(0, 0, 0))
        with pytest.raises(HardwareError) as refused:
            run_module.run_recipe(recipe)
    said = re.search(r"([\d,]+) bytes needed", str(refused.value))
    assert said is not None
    return int(said[1].replace(",", ""))


def in_folder(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"run_dir": str(folder)})


def test_checkpoints_that_are_there_are_not_asked_for_again(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"lora": {"r": 32, "alpha": 32}, "export": {"merge": False}}
    recipe = load_recipe(write_recipe(tmp_path, tiny_llama, **changed))
    often = recipe.train.model_copy(update={"save_strategy": "steps", "save_steps": 1})
    recipe = in_folder(recipe.model_copy(update={"train": often}), tmp_path / "run")
    at_first = asked(recipe, monkeypatch)
    assert run_module.run_recipe(recipe) is not None
    (tmp_path / "run" / "summary.json").unlink()
    files = [one for one in (tmp_path / "run").glob("checkpoint-*/*") if one.is_file()]
    there = sum(one.stat().st_size for one in files)
    assert 0 < there < at_first
    assert asked(recipe, monkeypatch) == at_first - there


def test_a_merge_that_is_there_is_not_asked_for_again(
    unended: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sum(one.stat().st_size for one in Path(unended.run_dir).glob("merged/*"))
    at_first = asked(in_folder(unended, tmp_path / "new"), monkeypatch)
    assert asked(unended, monkeypatch) == at_first - there


def test_the_disk_that_a_run_began_on_is_large_enough_after_a_kill_in_its_merge(
    unended: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was half merged fills it, and goes before room is asked for."""
    folder = Path(unended.run_dir)
    draft = folder / f".merged.{'0' * 32}.draft"
    (folder / "merged").rename(draft)
    needed = asked(in_folder(unended, tmp_path / "new"), monkeypatch)
    (draft / "more").write_bytes(bytes(needed // 2))
    small = SmallDisk(folder, needed + 100_000)  # records, log and the like
    monkeypatch.setattr(shutil, "disk_usage", small.usage)
    assert small.usage(folder).free < needed
    result = run_module.run_recipe(unended)
    assert result is not None
    assert not draft.exists()
