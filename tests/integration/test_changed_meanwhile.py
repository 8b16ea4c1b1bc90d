"""A run that is gone on with after something has changed: told, accepted or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora_kit.recipe import load_recipe
from qlora_kit.records import file_sha256
from qlora_kit.run import run_recipe

from .conftest import Call, Said, write_recipe, write_rows

LAST = 4


def words(text: str) -> str:
    """Without the line breaks that a terminal's width makes."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(tiny_llama, folder / "base")
    path = write_recipe(
        folder,
        folder / "base",
        train={
            "learning_rate": 1e-3,
            "max_steps": LAST,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        evaluate={"perplexity": False},
        export={"merge": False},
    )
    run_recipe(load_recipe(path))
    (folder / "run").rename(folder / "whole")
    shutil.copy(folder / "train.jsonl", folder / "kept.jsonl")
    return folder


@pytest.fixture
def cut_short(finished: Path) -> Path:
    """The same, as it was after its second update, in its own place."""
    run = finished / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished / "whole", run)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / f"checkpoint-{LAST}")
    shutil.copy(finished / "kept.jsonl", finished / "train.jsonl")
    return finished


def train(call: Call, folder: Path, *more: str) -> Said:
    return call("train", str(folder / "recipe.yaml"), *more)


def adapter_of(folder: Path) -> str:
    return file_sha256(folder / "adapter" / "adapter_model.safetensors")


def test_the_same_rows_in_another_file_and_no_recipe_yaml(cut_short: Path, call: Call) -> None:
    run = cut_short / "run"
    (run / "recipe.yaml").unlink()
    (cut_short / "train.jsonl").rename(cut_short / "moved.jsonl")
    moved = f"data.train.0.path={cut_short / 'moved.jsonl'}"
    ended = train(call, cut_short, moved)
    assert ended.code == 0, ended.err
    told = words(ended.out + ended.err)
    assert "recipe.yaml was gone; it is written again from checkpoint-2" in told
    assert "checkpoint-2 is whole; training goes on from there" in told
    assert "the rows are the same, token by token" in told
    assert adapter_of(run) == adapter_of(cut_short / "whole")
    assert load_recipe(run / "recipe.yaml").data.train[0].path.endswith("moved.jsonl")
    checked = call("verify", str(run))
    assert checked.code == 0, checked.out
    assert "Everything is as it was written." in checked.out


def test_other_rows_are_refused_by_the_name_of_their_file(cut_short: Path, call: Call) -> None:
    rows = [json.loads(line) for line in (cut_short / "train.jsonl").read_text().splitlines()]
    write_rows(cut_short / "train.jsonl", rows[:-1])
    before = (cut_short / "run" / "recipe.yaml").read_bytes()
    ended = train(call, cut_short, "train.logging_steps=2")
    assert ended.code == 1
    told = words(ended.err)
    assert "train.jsonl was changed (48 rows, digest " in told
    assert " → 47 rows, digest " in told
    assert "some are seen twice or never" in told
    assert "held-out.jsonl" not in told
    assert (cut_short / "run" / "recipe.yaml").read_bytes() == before


def test_a_base_that_is_configured_otherwise_is_refused_by_what_has_changed(
    cut_short: Path, call: Call
) -> None:
    path = cut_short / "base" / "config.json"
    before = path.read_text()
    config = {**json.loads(before), "attention_dropout": 0.25}
    try:
        path.write_text(json.dumps(config))
        ended = train(call, cut_short)
        assert ended.code == 1
        told = words(ended.err)
        assert "model_config: attention_dropout 0 → 0.25 (" in told
        assert "computes otherwise" in told
        path.write_text(json.dumps({**json.loads(before), "dtype": "float16"}, indent=9))
        ended = train(call, cut_short)
        assert ended.code == 0, ended.err
        assert "changed since" not in words(ended.out)
    finally:
        path.write_text(before)


def test_a_run_keeps_the_optimizer_that_it_was_begun_with(cut_short: Path, call: Call) -> None:
    """Such as one of a GPU, or of a version with another default."""
    run, eight = cut_short / "run", "train.optim=paged_adamw_8bit"
    shutil.rmtree(run)
    whole = train(call, cut_short, eight)
    assert whole.code == 0, whole.err
    adapter = adapter_of(run)
    assert adapter != adapter_of(cut_short / "whole")
    (run / "summary.json").unlink()
    shutil.rmtree(run / f"checkpoint-{LAST}")
    ended = train(call, cut_short)
    assert ended.code == 0, ended.err
    told = words(ended.out)
    assert (
        "optimizer paged_adamw_8bit (auto: with which the run was begun; a new one would have"
        in told
    )
    assert "changed since the run was begun" not in told
    assert adapter_of(run) == adapter
    assert load_recipe(run / "recipe.yaml").train.optim == "paged_adamw_8bit"


def test_another_schedule_begins_where_it_is_said_to(cut_short: Path, call: Call) -> None:
    plateau = ("train.lr_scheduler_type=reduce_lr_on_plateau", "train.eval_strategy=epoch")
    refused = train(call, cut_short, *plateau)
    assert refused.code == 1
    assert "it begins at train.learning_rate" in words(refused.err)
    ended = train(call, cut_short, *plateau, "train.learning_rate=0.005", "--allow-drift")
    assert ended.code == 0, ended.err
    lines = (cut_short / "run" / "log.jsonl").read_text().splitlines()
    rates = [one["learning_rate"] for one in map(json.loads, lines) if "learning_rate" in one]
    assert rates[2:] == pytest.approx([5e-3] * 2)


def test_a_finished_run_of_another_recipe_is_told_field_by_field(
    cut_short: Path, call: Call
) -> None:
    shutil.rmtree(cut_short / "run")
    shutil.copytree(cut_short / "whole", cut_short / "run")
    ended = train(call, cut_short, "train.seed=7")
    assert ended.code == 1
    assert "finished run of another recipe: - train.seed: 42 → 7" in words(ended.err)
