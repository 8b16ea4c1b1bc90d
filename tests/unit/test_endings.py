"""How a run is ended from outside, and what is said of it."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qlora_kit.checkpoint.run_directory import create_run
from qlora_kit.endings import said_by_the_disk, told_how_it_ends
from qlora_kit.errors import RunError, RunStopped
from qlora_kit.recipe import Recipe, recipe_from_dict
from qlora_kit.train.requests import Requests


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return recipe_from_dict(
        {
            "model": {"name_or_path": "demo/smollm2-135m-instruct"},
            "data": {"train": [{"path": "demo/commands"}]},
            "run_dir": str(tmp_path / "run"),
        },
        "test",
    )


def test_sigterm_between_updates_has_its_own_end(recipe: Recipe, tmp_path: Path) -> None:
    create_run(recipe)
    requests = Requests(tmp_path / "save-now")
    with (
        pytest.raises(RunStopped, match="no checkpoint yet") as ended,
        told_how_it_ends(recipe, requests),
    ):
        requests.on_signal(signal.SIGTERM, None)
    assert ended.value.signal_number == signal.SIGTERM


def test_ctrl_c_stays_what_it_is(recipe: Recipe, tmp_path: Path) -> None:
    requests = Requests(tmp_path / "save-now")
    with pytest.raises(KeyboardInterrupt), told_how_it_ends(recipe, requests):
        requests.on_signal(signal.SIGINT, None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/log"), "No space .* /x/log"),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "No"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "torch"),
    ],
)
def test_a_disk_that_refuses_is_told_of(recipe: Recipe, error: Exception, said: str) -> None:
    with (
        pytest.raises(RunError, match=r"the disk refuses: .*Nothing was written") as told,
        told_how_it_ends(recipe, Requests(Path("save-now"))),
    ):
        raise error
    assert said.split(" .* ")[0] in str(told.value)
    assert said.split(" .* ")[-1] in str(told.value)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no"), RuntimeError("shapes"), SafetensorError("header")],
)
def test_faults_of_ours_stay_what_they_are(recipe: Recipe, error: Exception) -> None:
    assert said_by_the_disk(error) is None
    with pytest.raises(type(error)), told_how_it_ends(recipe, Requests(Path("save-now"))):
        raise error
