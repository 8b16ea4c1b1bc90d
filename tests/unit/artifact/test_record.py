"""An artifact says what it was made from, and any change to it is seen."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_kit.artifact.record import (
    ARTIFACT_FILE,
    AdapterRef,
    BaseRef,
    CalibrationRecord,
    MadeFrom,
    ParentRef,
    made_from,
    read_record,
    verify_artifact,
    write_record,
)
from qlora_kit.errors import ArtifactError
from qlora_kit.records import sealed_bytes

BASE = BaseRef("demo/model", "f" * 64, revision="abc")


def fill(folder: Path) -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "onnx" / "graph.onnx").write_bytes(b"graph")
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = fill(tmp_path / "run" / "merged")
    write_record(
        folder,
        kind="merged",
        made_from=MadeFrom(
            BASE, AdapterRef(str(tmp_path / "run" / "adapter"), "a" * 64), "r" * 64, None
        ),
        settings={"base": "original", "dtype": "float16"},
        calibration=CalibrationRecord("demo/commands", 4096, 42),
        tools={"llama.cpp": "b1"},
    )
    return folder


def test_a_whole_one_has_no_findings_and_comes_back(artifact: Path, tmp_path: Path) -> None:
    assert verify_artifact(artifact) == ()
    record = read_record(artifact)
    assert record.kind == "merged"
    assert record.made_from.base == BASE
    assert record.made_from.adapter == AdapterRef(str(tmp_path / "run" / "adapter"), "a" * 64)
    assert record.calibration == CalibrationRecord("demo/commands", 4096, 42)
    assert record.versions["llama.cpp"] == "b1"
    assert record.versions["torch"]
    assert list(record.files) == ["model.safetensors", "onnx/graph.onnx"]
    assert record.files["onnx/graph.onnx"].sha256 == hashlib.sha256(b"graph").hexdigest()


def test_the_file_says_its_own_hash(artifact: Path) -> None:
    """Recomputed here without the kit's functions."""
    values = json.loads((artifact / ARTIFACT_FILE).read_bytes())
    said = values.pop("sha256_of_the_rest")
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert said == hashlib.sha256(text.encode()).hexdigest() == read_record(artifact).sha256


def change(path: Path) -> None:
    path.write_bytes(b"weighty")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda one: change(one / "model.safetensors"), "model.safetensors is not what was"),
        (lambda one: (one / "onnx" / "graph.onnx").unlink(), "onnx/graph.onnx is missing"),
        (lambda one: (one / "onnx" / "more").write_text("x"), "onnx/more is extra"),
        (lambda one: (one / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (lambda one: (one / ARTIFACT_FILE).unlink(), "artifact.json is missing"),
        (lambda one: (one / ARTIFACT_FILE).write_text("{"), "does not parse"),
    ],
    ids=["changed", "missing", "extra", "empty", "no record", "half a record"],
)
def test_damage_is_named(artifact: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(artifact)
    (finding,) = verify_artifact(artifact)
    assert said in finding


def test_a_single_letter_of_the_record_counts(artifact: Path) -> None:
    path = artifact / ARTIFACT_FILE
    path.write_text(path.read_text().replace('"original"', '"originaL"'))
    (finding,) = verify_artifact(artifact)
    assert finding == "artifact.json is damaged: it is not what was written"
    with pytest.raises(ArtifactError, match="it is not what was written"):
        read_record(artifact)


def test_a_record_from_the_future_is_not_guessed_at(artifact: Path) -> None:
    values = json.loads((artifact / ARTIFACT_FILE).read_bytes())
    del values["sha256_of_the_rest"]
    (artifact / ARTIFACT_FILE).write_bytes(sealed_bytes({**values, "format": 99}))
    (finding,) = verify_artifact(artifact)
    assert "newer qlora-kit" in finding


def test_what_is_hidden_belongs_to_others(artifact: Path) -> None:
    (artifact / ".git").mkdir()
    (artifact / ".git" / "HEAD").write_text("x")
    (artifact / ".DS_Store").write_text("x")
    assert verify_artifact(artifact) == ()


def test_what_is_made_from_an_artifact_inherits_its_origin(artifact: Path, tmp_path: Path) -> None:
    draft = fill(tmp_path / "run" / ".draft")
    origin = made_from(artifact, BaseRef("not/asked", None))
    parent = read_record(artifact)
    assert origin == MadeFrom(
        parent.made_from.base,
        parent.made_from.adapter,
        "r" * 64,
        ParentRef("merged", str(artifact), parent.sha256),
    )
    home = tmp_path / "run" / "exports" / "nf4"
    write_record(draft, kind="nf4", made_from=origin, home=home)
    home.parent.mkdir()
    draft.rename(home)
    assert read_record(home).made_from == origin
    assert made_from(tmp_path, BASE) == MadeFrom(base=BASE)


def test_a_run_that_is_moved_keeps_its_lineage(artifact: Path, tmp_path: Path) -> None:
    child = fill(tmp_path / "run" / "exports" / "nf4")
    write_record(child, kind="nf4", made_from=made_from(artifact, BASE))
    assert str(tmp_path) not in (child / ARTIFACT_FILE).read_text()
    moved = shutil.move(tmp_path / "run", tmp_path / "deep" / "elsewhere")
    parent = read_record(Path(moved) / "exports" / "nf4").made_from.parent
    assert parent is not None
    assert parent.path == str(tmp_path / "deep" / "elsewhere" / "merged")


def test_a_parent_far_away_keeps_its_whole_path(artifact: Path, tmp_path: Path) -> None:
    child = fill(tmp_path / "a" / "b" / "c" / "nf4")
    write_record(child, kind="nf4", made_from=made_from(artifact, BASE))
    assert json.loads((child / ARTIFACT_FILE).read_text())["made_from"]["parent"]["path"] == str(
        artifact
    )
