"""`verify` says what it looked at, and ends with 1 where anything is not as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qlora_kit.artifact.record import BaseRef, MadeFrom, made_from, write_record
from qlora_kit.cli import app
from qlora_kit.errors import ArtifactError

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
