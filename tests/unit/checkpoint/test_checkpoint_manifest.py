"""A checkpoint that is not as it was written is recognised, whatever was done to it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_disk import content_of, writer

from qlora_kit.checkpoint.checkpoints import newest_whole, publish_checkpoint
from qlora_kit.checkpoint.manifest import (
    MANIFEST_FILE,
    faults_at_a_glance,
    faults_of,
    read_manifest,
    step_of,
)
from qlora_kit.records import sealed_bytes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for step in (8, 12):
        publish_checkpoint(tmp_path / f"checkpoint-{step}", writer(step, "whole"))
    return tmp_path / "checkpoint-12"


def test_a_whole_one_has_no_faults(checkpoint: Path) -> None:
    assert faults_of(checkpoint) == faults_at_a_glance(checkpoint) == ()
    manifest = read_manifest(checkpoint)
    assert manifest.step == 12
    assert {name: record.num_bytes for name, record in manifest.files.items()} == {
        name: len(content) for name, content in content_of(12, "whole").items()
    }


def test_every_flipped_byte_of_the_manifest_is_seen(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_FILE
    raw = path.read_bytes()
    for place in range(len(raw)):
        for bit in (0x01, 0x20, 0xFF):  # 0x20 turns small letters into capitals
            damaged = bytearray(raw)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            assert faults_of(checkpoint), f"byte {place} xor {bit:#x} was not seen"
    path.write_bytes(raw)
    assert faults_of(checkpoint) == ()


def test_every_way_to_cut_the_manifest_short_is_seen(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_FILE
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert faults_of(checkpoint), f"{length} of {len(raw)} bytes were not seen"
    for longer in (raw + b"\n", raw + raw, b"\xef\xbb\xbf" + raw):
        path.write_bytes(longer)
        assert faults_of(checkpoint)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def add_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [*content_of(12, "whole"), MANIFEST_FILE])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "is not what was written|is damaged"),
        (add_a_byte, r"where [\d,]+ were written|is damaged"),
        (make_empty, "is empty"),
        (Path.unlink, "is missing"),
        (put_a_folder_there, "is no file|cannot be read"),
    ],
    ids=["byte flipped", "longer", "empty", "missing", "a folder"],
)
def test_damage_is_named_and_the_one_before_is_used(
    checkpoint: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    damage(checkpoint / name)
    for look in (faults_of, faults_at_a_glance):
        (fault,) = look(checkpoint)
        assert fault.startswith(name)
        assert re.search(said, fault)
    found = newest_whole(checkpoint.parent)
    assert found.folder == checkpoint.with_name("checkpoint-8")
    assert found.step == 8
    assert found.damaged == ((checkpoint, faults_of(checkpoint)),)


def test_every_fault_is_told_not_only_the_first(checkpoint: Path) -> None:
    (checkpoint / "adapter.bin").unlink()
    make_empty(checkpoint / "state.json")
    assert len(faults_of(checkpoint)) == 2


def test_a_checkpoint_under_the_name_of_another_is_none(checkpoint: Path) -> None:
    copy = checkpoint.with_name("checkpoint-40")
    shutil.copytree(checkpoint, copy)
    assert faults_of(copy) == ("manifest.json is of step 12",)
    assert newest_whole(checkpoint.parent).folder == checkpoint


def test_one_moved_to_another_run_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    moved = shutil.copytree(checkpoint, tmp_path / "other" / "checkpoint-12")
    assert faults_of(moved) == faults_at_a_glance(moved) == ()


def test_files_that_the_manifest_does_not_name_are_left_alone(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("by the user")
    (checkpoint / ".cache").mkdir()
    assert faults_of(checkpoint) == ()


def test_a_manifest_from_the_future_is_not_guessed_at(checkpoint: Path) -> None:
    values = json.loads((checkpoint / MANIFEST_FILE).read_bytes())
    del values["sha256_of_the_rest"]
    values["format"] = 99
    (checkpoint / MANIFEST_FILE).write_bytes(sealed_bytes(values))
    (fault,) = faults_of(checkpoint)
    assert "newer qlora-kit" in fault


def test_a_file_that_cannot_be_read_is_a_fault(checkpoint: Path) -> None:
    loop = checkpoint / "adapter.bin"
    loop.unlink()
    loop.symlink_to(loop)
    (fault,) = faults_of(checkpoint)
    assert fault.startswith("adapter.bin cannot be read: ")


def test_at_a_glance_reads_only_what_was_touched_since(checkpoint: Path) -> None:
    """Contents that changed under the file system are for a resume to find."""
    manifest, adapter = checkpoint / MANIFEST_FILE, checkpoint / "adapter.bin"
    flip_a_byte(adapter)
    assert faults_at_a_glance(checkpoint)
    while manifest.stat().st_ctime_ns <= adapter.stat().st_ctime_ns:
        os.utime(manifest)  # now the manifest is the younger one
    assert faults_at_a_glance(checkpoint) == ()
    assert faults_of(checkpoint)


@pytest.mark.parametrize("name", ["checkpoint-0", "checkpoint-7", "checkpoint-1200"])
def test_the_step_is_in_the_name(name: str) -> None:
    assert f"checkpoint-{step_of(Path('run') / name)}" == name
