"""Room on the disk is asked for before the work, and for as much as the work writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_kit import run as run_module
from qlora_kit.errors import HardwareError
from qlora_kit.evaluate.divergence import DEFAULT_MAX_TOKENS
from qlora_kit.recipe import load_recipe

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

    monkeypatch.setattr(run_module, "require_disk", note)
    with pytest.raises(Stop):
        run_module.run_recipe(recipe)
    written = ["adapter", "merged"] if merge else ["adapter"]
    weights = [path for name in written for path in (finished.folder / name).glob("*.safetensors")]
    assert len(weights) == len(written)
    vocabulary, weighed = 384, sum(path.stat().st_size for path in weights)
    most = 4 * vocabulary * DEFAULT_MAX_TOKENS  # what the trained graph said, were there many rows
    assert 0.9 * weighed <= asked[0] <= 10 * weighed < most + weighed
