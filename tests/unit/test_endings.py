"""How a run is ended from outside, and what is said of it."""

from __future__ import annotations

import errno
import shutil
import signal
from pathlib import Path

import pytest
from faulty_disk import writer
from safetensors import SafetensorError

from qlora_kit.checkpoint import run_directory
from qlora_kit.checkpoint.checkpoints import publish_checkpoint
from qlora_kit.checkpoint.run_directory import create_run
from qlora_kit.endings import saying_what_is_kept, told_how_it_ends
from qlora_kit.errors import CheckpointError, DiskError, ProcessLost, RunError, RunStopped
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
    with pytest.raises(type(error)), told_how_it_ends(recipe, Requests(Path("save-now"))):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no"), CheckpointError("checkpoint-4 cannot be")]
)
def test_a_folder_that_somebody_deleted_is_told_of(recipe: Recipe, error: Exception) -> None:
    run = create_run(recipe)
    with pytest.raises(type(error)), saying_what_is_kept(recipe):
        raise error  # of something else, as the folder is there
    shutil.rmtree(run.folder)
    gone = pytest.raises(RunError, match="is gone: it was deleted or moved")
    with gone, saying_what_is_kept(recipe):
        raise error


def test_what_is_kept_is_told_where_another_process_is_lost(recipe: Recipe) -> None:
    create_run(recipe)
    with (
        pytest.raises(ProcessLost, match=r"another of the 2 .* holds no checkpoint yet"),
        told_how_it_ends(recipe, Requests(Path("save-now"))),
    ):
        raise ProcessLost("another of the 2 processes has ended.")


def test_what_another_process_was_told_says_what_is_kept_as_well(recipe: Recipe) -> None:
    run = create_run(recipe)
    for step in (4, 8):
        publish_checkpoint(run.folder / f"checkpoint-{step}", writer(step, "new"))
    (run.folder / "checkpoint-8" / "state.json").write_text("half of")
    refused = DiskError("the disk refuses: it is full. Make room or mend it.")
    refused.is_told_elsewhere = True
    with (
        pytest.raises(DiskError, match=r"mend it. .*run holds checkpoint-4. The same") as told,
        told_how_it_ends(recipe, Requests(Path("save-now"))),
    ):
        raise refused
    assert told.value.is_told_elsewhere


def test_a_folder_that_cannot_be_read_any_more_is_told_of_too(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_run(recipe)

    def refuse(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(run_directory, "find_checkpoints", refuse)
    with (
        pytest.raises(DiskError, match=r"run cannot be read any more \(Input/output error\)"),
        told_how_it_ends(recipe, Requests(Path("save-now"))),
    ):
        raise OSError(errno.EIO, "Input/output error")
