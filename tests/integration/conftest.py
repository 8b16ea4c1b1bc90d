"""The command line, called in this process, and one finished run that tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from together import Together

from qlora_kit import cli

ROOT = Path(__file__).parents[2]

COLOURS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]
THINGS = ["lamp", "door", "car", "hat", "cup", "pen", "bag", "box"]


@dataclass(frozen=True)
class Said:
    """What a call printed, and its exit code."""

    code: int
    out: str
    err: str


Call = Callable[..., Said]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> Said:
        monkeypatch.setattr("sys.argv", ["qlora-kit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else 1, *printed)

    return run


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_rows() -> list[dict[str, object]]:
    """A task of 64 rows that a tiny model learns in part."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"paint the {thing} {colour}"},
                {"role": "assistant", "content": f"{thing}={colour}"},
            ]
        }
        for thing in THINGS
        for colour in COLOURS
    ]


def write_recipe(folder: Path, model: Path, **sections: object) -> Path:
    """A complete recipe in `folder` for the task above; `sections` replace whole sections."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = task_rows()
    write_rows(folder / "train.jsonl", rows[::2] + rows[1::4])
    write_rows(folder / "held-out.jsonl", rows[3::4])
    values: dict[str, object] = {
        "model": {"name_or_path": str(model)},
        "data": {
            "train": [{"path": str(folder / "train.jsonl")}],
            "eval": [{"path": str(folder / "held-out.jsonl")}],
            "max_length": 96,
        },
        "lora": {"r": 8, "alpha": 16},
        "train": {
            "learning_rate": 1e-2,
            "max_steps": 20,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "save_strategy": "no",
        },
        "evaluate": {"generate": {"max_new_tokens": 8}},
        "export": {"merge": True, "merge_options": {"base": "dequantized", "dtype": "float32"}},
        "run_dir": str(folder / "run"),
        **sections,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    """Two processes that train together whatever a test gives them."""
    together = Together(tmp_path_factory.mktemp("two"), 2)
    yield together
    together.end()


@dataclass(frozen=True)
class FinishedRun:
    recipe: Path
    folder: Path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> FinishedRun:
    """One run through the library; tests read it and leave it as it is."""
    from qlora_kit.recipe import load_recipe
    from qlora_kit.run import run_recipe

    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, tiny_llama)
    run_recipe(load_recipe(path))
    return FinishedRun(path, folder / "run")
