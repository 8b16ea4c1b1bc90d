"""Every command in the README, in its order, in a folder like a fresh clone's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_kit.recipe.yaml import parse_yaml

from .conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent

# Commands that take a recipe are run as they stand, on a model that takes seconds.
QUICK = (
    "model.name_or_path={model} train.max_steps=2 evaluate.generate.max_new_tokens=4 "
    "data.train.0.max_rows=32 data.eval.0.max_rows=8 export.merge_options.max_kl=1"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def on_a_model(line: str) -> bool:
    return " train " in line or line.startswith("qlora-kit data ")


def test_make_targets_exist_and_the_environment_is_where_the_readme_says() -> None:
    made = [line for line in commands() if line.startswith("make ")]
    assert {"make quickstart", "make test"} <= set(made)
    for line in made:
        shown = subprocess.run(
            [*line.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
    assert ". .venv/bin/activate" in commands()
    assert re.search(r"^VENV := \.venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_recipe_in_the_readme_is_a_recipe() -> None:
    from qlora_kit.recipe import recipe_from_dict

    shown = [parse_yaml(block, "README.md") for block in blocks("yaml")]
    assert shown
    for values in shown:
        recipe = recipe_from_dict({"run_dir": "runs/x", **values}, "README.md")
        assert recipe.model_dump(mode="json").keys() >= values.keys()


def test_row_shapes_in_the_readme_are_understood(tmp_path: Path) -> None:
    from qlora_kit.data.prepare import read_examples
    from qlora_kit.recipe import SourceSpec

    rows = [line for block in blocks("json") for line in block.splitlines() if line]
    assert len(rows) >= 4
    for line in rows:
        (tmp_path / "train.jsonl").write_text(line + "\n", encoding="utf-8")
        source = SourceSpec(path=str(tmp_path / "train.jsonl"))
        assert len(list(read_examples([source]))) == 1, line


def test_every_verb_is_in_the_table() -> None:
    from qlora_kit.cli import app

    table = set(re.findall(r"^\| `([a-z-]+)", README, re.MULTILINE))
    registered = {one.name for one in app.registered_commands}
    registered |= {one.name for one in app.registered_groups}
    assert registered == table


@pytest.mark.timeout(900)
def test_commands_run_in_their_order(tmp_path: Path, tiny_llama: Path) -> None:
    for name in ("recipes", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    run = [line for line in commands() if not line.startswith(("make ", ". .venv"))]
    assert len(run) >= 10
    for line in run:
        command = f"{line} {QUICK.format(model=tiny_llama)}" if on_a_model(line) else line
        if line.startswith("qlora-kit compare "):  # the model's context is short
            command += " --prompt-tokens 32 --new-tokens 4 --repetitions 1"
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, f"{line} says nothing"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "quickstart" / "merged" / "certificate.json").is_file()
    assert (tmp_path / "merged-fp16" / "certificate.json").is_file()
    assert (tmp_path / "merged-script" / "certificate.json").is_file()
