"""Two processes under torchrun: stopped, gone on with, killed, and gone on with again."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from together import Job, Together, environment_of_launch

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.recipe import load_recipe
from qlora_kit.run import run_recipe

from .conftest import write_recipe

FLOAT_ERROR = 1e-5
LAST = 36
PATIENCE_SECONDS = 200.0


@dataclass
class Launch:
    """`torchrun` with two processes of `qlora-kit train`, and what they say."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def said(self) -> str:
        return self.output.read_text()

    def kill_one(self, rank: int) -> None:
        workers = psutil.Process(self.process.pid).children()
        next(one for one in workers if one.environ()["RANK"] == str(rank)).kill()

    def wait(self) -> None:
        self.process.wait(PATIENCE_SECONDS)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not is_so():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.02)


def launch(recipe: Path, output: Path) -> Launch:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--nproc-per-node", "2", "-m", "qlora_kit", "train", str(recipe)]
    with output.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment_of_launch()
        )
    return Launch(process, output)


def newest(folder: Path) -> int:
    found = find_checkpoints(folder) if folder.is_dir() else []
    return int(found[0].name.partition("-")[2]) if found else 0


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@dataclass(frozen=True)
class Story:
    recipe: Path
    folder: Path
    stopped: Launch
    stopped_at: int
    killed: Launch


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Story:
    """A run that was stopped, gone on with by the same command, and had one process killed."""
    root = tmp_path_factory.mktemp("killed")
    recipe = write_recipe(
        root,
        tiny_llama,
        train={
            "learning_rate": 1e-3,
            "max_steps": LAST,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        lora={"r": 8, "alpha": 16, "dropout": 0.0},
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    folder = root / "run"
    stopped = launch(recipe, root / "stopped.txt")
    stopped.wait_until(lambda: newest(folder) >= 2)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait()
    stopped_at = newest(folder)
    killed = launch(recipe, root / "killed.txt")
    killed.wait_until(lambda: newest(folder) > stopped_at)
    killed.kill_one(1)
    killed.wait()
    return Story(recipe, folder, stopped, stopped_at, killed)


def test_a_stop_of_the_launcher_saves_and_is_told_once(story: Story) -> None:
    said = story.stopped.said
    assert said.count("stopped by SIGTERM") == 1
    assert "error: " not in said
    assert 2 <= story.stopped_at < LAST
    assert said.count("machine   ") == 1, "both processes speak"


def test_killing_one_ends_the_other_with_one_message(story: Story) -> None:
    said = story.killed.said
    assert story.killed.process.returncode == 1
    assert f"checkpoint-{story.stopped_at} is whole; training goes on from there" in said
    assert said.count("error: ") == 1
    assert "another of the 2 processes has ended" in said
    assert re.search(r"run holds checkpoint-\d+\. The same command goes on", said)
    assert "/qlora_kit/" not in said, "a traceback of ours"
    assert story.stopped_at < newest(story.folder) < LAST


@pytest.mark.parametrize(
    ("count", "more"), [(1, ()), (2, ()), (1, ("train.gradient_accumulation_steps=4",))]
)
def test_the_run_goes_on_to_the_same_end(
    story: Story,
    uninterrupted: Path,
    tmp_path: Path,
    count: int,
    more: tuple[str, ...],
    two: Together,
) -> None:
    """With one process too, whether or not its share of an update is doubled by hand."""
    folder = tmp_path / "run"
    shutil.copytree(story.folder, folder)
    given = (f"run_dir={folder}", "train.save_steps=1000", *more)
    if count == 1:
        run_recipe(load_recipe(story.recipe, given))
    else:
        assert two.train(tmp_path, [Job(str(story.recipe), given)]) == [["", ""]]
    assert len(curve(uninterrupted)) == LAST
    assert curve(folder) == pytest.approx(curve(uninterrupted), rel=FLOAT_ERROR)
    assert curve(folder, "tokens") == pytest.approx(curve(uninterrupted, "tokens"))


@pytest.fixture(scope="module")
def uninterrupted(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process, eight sequences at a time."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    batch = ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1")
    run_recipe(load_recipe(story.recipe, (f"run_dir={folder}", "train.save_steps=1000", *batch)))
    return folder
