"""Several processes train what one trains: the same sets of rows, the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from together import Job, Together

from qlora_kit.environment import cache_dir
from qlora_kit.recipe import load_recipe
from qlora_kit.run import run_recipe

from .conftest import task_rows, write_recipe, write_rows

# What a micro-batch of 8 rounds otherwise than eight of one.
FLOAT_ERROR = 1e-5
WAYS = {  # sequences at a time × accumulation × processes
    "8 × 1 × 1": (8, 1, 1),
    "1 × 8 × 1": (1, 8, 1),
    "2 × 4 × 1": (2, 4, 1),
    "4 × 1 × 2": (4, 1, 2),
    "2 × 2 × 2": (2, 2, 2),
    "1 × 4 × 2": (1, 4, 2),
}
VARIANTS = {
    "packed": ("data.packing=true", "data.max_length=64"),
    "by length": ("train.train_sampling_strategy=group_by_length",),
    "without padding": ("data.padding_free=true",),
}


def overrides(way: str, folder: Path, *more: str) -> tuple[str, ...]:
    each, accumulation, _ = WAYS[way]
    return (
        f"train.per_device_train_batch_size={each}",
        f"train.gradient_accumulation_steps={accumulation}",
        f"run_dir={folder}",
        *more,
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in log_of(folder) if key in line]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """41 rows, so that the last update of a pass has one row for all processes."""
    folder = tmp_path_factory.mktemp("processes")
    path = write_recipe(
        folder,
        tiny_llama,
        train={
            "learning_rate": 3e-3,
            "num_train_epochs": 1.5,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "no",
        },
        lora={"r": 8, "alpha": 16, "dropout": 0.0},
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    rows = task_rows()
    write_rows(folder / "train.jsonl", [row for row in rows if row not in rows[3::4]][:41])
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory, two: Together) -> dict[str, Path]:
    """One run of each way, and two of each variant."""
    root = tmp_path_factory.mktemp("ways")
    wanted = [(way, way, ("data.padding_free=false",)) for way in WAYS]
    for variant, more in VARIANTS.items():
        wanted += [(f"{variant} {way}", way, more) for way in ("2 × 4 × 1", "2 × 2 × 2")]
    folders = {name: root / str(number) for number, (name, _, _) in enumerate(wanted)}
    shared = [Job(str(recipe), overrides("4 × 1 × 2", root / "nan", "train.learning_rate=1e30"))]
    for name, way, more in wanted:
        given = overrides(way, folders[name], *more)
        if WAYS[way][2] == 1:
            run_recipe(load_recipe(recipe, given))
        else:
            shared.append(Job(str(recipe), given))
    raised = two.train(root, shared)
    assert raised[1:] == [["", ""]] * len(shared[1:])
    (root / "nan" / "raised.json").write_text(json.dumps(raised[0]))
    return {**folders, "not finite": root / "nan"}


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_to_share_an_update_gives_one_curve(runs: dict[str, Path], way: str) -> None:
    alone, shared = runs["8 × 1 × 1"], runs[way]
    assert len(curve(alone)) == 9
    assert curve(shared) == pytest.approx(curve(alone), rel=FLOAT_ERROR)
    assert curve(shared, "eval_loss") == pytest.approx(curve(alone, "eval_loss"), rel=FLOAT_ERROR)
    norms = curve(alone, "grad_norm")
    assert curve(shared, "grad_norm") == pytest.approx(norms, rel=10 * FLOAT_ERROR)
    assert curve(alone)[-1] < curve(alone)[0]


def test_tokens_and_padding_are_counted_over_all(runs: dict[str, Path]) -> None:
    for way in WAYS:
        assert curve(runs[way], "tokens") == curve(runs["8 × 1 × 1"], "tokens")
    for one, two in (("1 × 8 × 1", "1 × 4 × 2"), ("2 × 4 × 1", "2 × 2 × 2")):
        assert curve(runs[one], "padding") == curve(runs[two], "padding")
    assert curve(runs["2 × 2 × 2"], "padding")[-1] > 0


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_packed_and_grouped_too(runs: dict[str, Path], variant: str) -> None:
    alone, shared = runs[f"{variant} 2 × 4 × 1"], runs[f"{variant} 2 × 2 × 2"]
    assert curve(shared) == pytest.approx(curve(alone), rel=FLOAT_ERROR)
    assert curve(shared, "tokens") == curve(alone, "tokens")
    assert curve(shared, "padding") == curve(alone, "padding")
    is_padded_run = curve(alone) == pytest.approx(curve(runs["2 × 4 × 1"]), rel=FLOAT_ERROR)
    assert is_padded_run == (variant == "without padding")


def test_the_base_is_quantized_once_and_read_by_the_others(runs: dict[str, Path]) -> None:
    kept = list((cache_dir() / "quantized").iterdir())
    assert len(kept) == 1
    assert (kept[0] / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_all_and_is_told_by_one(runs: dict[str, Path]) -> None:
    told, other = json.loads((runs["not finite"] / "raised.json").read_text())
    assert "became nan at step" in told or "became inf at step" in told
    assert other == f"(told elsewhere) {told}"
    assert (runs["not finite"] / "last-good").is_dir()
