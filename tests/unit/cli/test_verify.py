"""`verify` says what it looked at, and ends with 1 where anything is not as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_kit.artifact.record import AdapterRef, BaseRef, MadeFrom, made_from, write_record
from qlora_kit.cli import app
from qlora_kit.errors import ArtifactError
from qlora_kit.recipe import Recipe, load_recipe, recipe_from_dict, recipe_hash, recipe_text
from qlora_kit.recipe.identity import every_field_hash
from qlora_kit.records import file_sha256

BASE = BaseRef("nobody/nowhere", "f" * 64)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Path]:
    parent, child = tmp_path / "merged", tmp_path / "exports" / "nf4"
    for folder in (parent, child):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(folder.name)
    write_record(parent, kind="merged", made_from=MadeFrom(BASE))
    write_record(child, kind="nf4", made_from=made_from(parent, BASE))
    return parent, child


def run(*arguments: str) -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["verify", *arguments])
    return ended.exit_code, ended.stdout


def test_a_base_that_cannot_be_had_is_said_and_is_no_finding(chain: tuple[Path, Path]) -> None:
    code, said = run(str(chain[1]))
    assert code == 0
    assert "nf4" in said
    assert "whole (2 files)" in said
    assert f"from merged {chain[0]}: the same" in said
    assert "nobody/nowhere: not checked" in said
    assert "Everything is as it was written." in said


def test_a_parent_that_changed_or_was_made_again_is_a_finding(chain: tuple[Path, Path]) -> None:
    parent, child = chain
    (parent / "weights").write_text("mergex")
    code, said = run(str(child))
    assert code == 1
    assert "weights is not what was written" in said
    write_record(parent, kind="merged", made_from=MadeFrom(BASE))
    assert "it was made again since" in run(str(child))[1]
    (parent / "artifact.json").unlink()
    assert "has lost its artifact.json" in run(str(child))[1]
    assert run(str(child), "--no-lineage")[0] == 0


def test_figures_for_machines(chain: tuple[Path, Path]) -> None:
    (chain[1] / "more").touch()
    code, said = run(str(chain[1]), "--json")
    values = json.loads(said)
    assert code == 1
    assert not values["holds"]
    itself, parent, base = values["checked"]
    assert itself["faults"] == ["more is extra: it was not there when the artifact was made"]
    assert (parent["role"], parent["kind"], parent["faults"]) == ("parent", "merged", [])
    assert "cannot be reached" in base["unchecked"]


@pytest.mark.parametrize("name", ["", "missing"])
def test_what_nobody_recorded_cannot_be_verified(tmp_path: Path, name: str) -> None:
    ended = CliRunner().invoke(app, ["verify", str(tmp_path / name)])
    assert isinstance(ended.exception, ArtifactError)
    assert ("does not exist" if name else "nobody recorded") in str(ended.exception)


@pytest.mark.parametrize("hashed", [recipe_hash, every_field_hash])
def test_a_recipe_is_the_same_where_a_version_knows_more_fields(
    tmp_path: Path, hashed: Callable[[Recipe], str]
) -> None:
    values = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
    recipe = recipe_from_dict(values, "test")
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for folder in (adapter, merged):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text("weights")
    made = AdapterRef(str(adapter), file_sha256(adapter / "adapter_model.safetensors"))
    write_record(merged, kind="merged", made_from=MadeFrom(BASE, made, hashed(recipe)))
    lines = recipe_text(recipe).splitlines(keepends=True)
    older = [line for line in lines if "tf32" not in line]
    assert len(older) == len(lines) - 1
    (tmp_path / "recipe.yaml").write_text("".join(older))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    code, said = run(str(merged))
    assert (code, "another one" in said) == (0, False), said
    (tmp_path / "recipe.yaml").write_text("".join(lines).replace("seed: 42", "seed: 7"))
    code, said = run(str(merged))
    assert (code, "is another one than it was made with" in said) == (1, True), said
