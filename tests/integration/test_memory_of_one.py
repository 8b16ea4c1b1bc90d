"""Memory that runs out on one of two processes in the middle of training, or a disk that fails."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from together import Job, Together

from qlora_kit.checkpoint.checkpoints import find_checkpoints

from .conftest import task_rows, write_recipe, write_rows

FLOAT_ERROR = 1e-5
# Forward passes that go well: memory runs out in the last micro-batch of the third update, where
# DistributedDataParallel would exchange the gradients.
WELL = 5


@dataclass(frozen=True)
class Ended:
    """A run of two processes: what each raised, what the main one said, and its folder."""

    raised: list[str]
    said: str
    folder: Path

    def curve(self, key: str = "loss") -> list[float]:
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, two: Together
) -> dict[str, Ended]:
    """41 rows of 8 an update: the last of a pass has one row for both processes."""
    root = tmp_path_factory.mktemp("memory")
    recipe = write_recipe(
        root,
        tiny_llama,
        train={
            "learning_rate": 3e-3,
            "max_steps": 7,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        lora={"r": 8, "alpha": 16, "dropout": 0.0},
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    write_rows(root / "train.jsonl", task_rows()[:41])
    wanted: dict[str, tuple[str, tuple[int, int, int] | None]] = {
        "whole": ("whole", None),
        "halved": ("halved", (1, 1, WELL)),
        "ended": ("parts", (1, 0, 6)),
        "gone on with": ("parts", (1, 1, 0)),
    }
    jobs = [
        Job(str(recipe), (f"run_dir={root / folder}",), short) for folder, short in wanted.values()
    ]
    wanted["failed"] = ("failed", None)
    saves = ("train.max_steps=40", "train.save_strategy=steps", "train.save_steps=20")
    jobs.append(Job(str(recipe), (f"run_dir={root / 'failed'}", *saves), failing=1))
    raised = two.train(root, jobs)
    return {
        name: Ended(raised[number], (root / f"said-{number}.txt").read_text(), root / folder)
        for number, (name, (folder, _)) in enumerate(wanted.items())
    }


def test_all_halve_and_train_on_the_same_rows(runs: dict[str, Ended]) -> None:
    whole, halved = runs["whole"], runs["halved"]
    assert halved.raised == whole.raised == ["", ""]
    assert halved.said.count("out of memory at update 3") == 1
    assert "1 sequence at a time instead of 2" in halved.said
    assert halved.curve() == pytest.approx(whole.curve(), rel=FLOAT_ERROR)
    assert halved.curve("grad_norm") == pytest.approx(whole.curve("grad_norm"), rel=1e-4)
    assert halved.curve("tokens") == whole.curve("tokens")


def test_one_sequence_too_many_ends_all_with_a_checkpoint(runs: dict[str, Ended]) -> None:
    told, other = runs["ended"].raised
    assert told.endswith("holds checkpoint-3. Changed so, the run goes on from there.")
    what = "out of memory with one sequence at a time"
    assert told.startswith(what)
    assert other.startswith(f"(told elsewhere) {what}")
    assert find_checkpoints(runs["ended"].folder)[-1].name == "checkpoint-3"


def test_what_fits_is_known_to_the_run_that_goes_on(runs: dict[str, Ended]) -> None:
    again = runs["gone on with"]
    assert again.raised == ["", ""]
    assert "1 of 2 sequences at a time from the start" in again.said
    assert "out of memory at" not in again.said
    assert again.curve() == pytest.approx(runs["whole"].curve(), rel=FLOAT_ERROR)


def test_a_failed_write_beside_training_ends_all_before_the_next_save(
    runs: dict[str, Ended],
) -> None:
    failed = runs["failed"]
    told, other = failed.raised
    assert "checkpoint-20 could not be written" in told
    assert "Input/output error" in told
    assert "No whole checkpoint is there yet. Make room or mend the disk" in told
    assert other == f"(told elsewhere) {told}"
    assert 20 <= len(failed.curve()) < 40
