"""Checkpoints are published whole, found by number, and rotated."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk, content_of, prepare, writer

from qlora_kit.checkpoint.checkpoints import (
    clear_leftovers,
    find_checkpoints,
    newest_whole,
    publish_checkpoint,
    rotate,
)
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.checkpoint.manifest import MANIFEST_FILE, faults_of


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestPublishing:
    def test_what_was_written_is_there_and_nothing_else(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint-8"
        publish_checkpoint(folder, writer(8, "old"))
        assert names_in(tmp_path) == ["checkpoint-8"]
        assert names_in(folder) == sorted([*content_of(8, "old"), MANIFEST_FILE])
        assert faults_of(folder) == ()

    def test_everything_is_flushed_and_the_manifest_comes_last(self, tmp_path: Path) -> None:
        disk = FaultyDisk()
        publish_checkpoint(tmp_path / "checkpoint-8", writer(8, "old"), disk)
        (draft,) = {name for name in disk.operations if name.endswith(".draft")}
        assert disk.operations == [
            *(f"sync {name}" for name in sorted(content_of(8, "old"))),
            "write manifest.json",
            "sync manifest.json",
            draft,
            "rename to checkpoint-8",
            f"sync {tmp_path.name}",
        ]

    def test_the_same_values_give_the_same_bytes(self, tmp_path: Path) -> None:
        for run in ("a", "b"):
            (tmp_path / run).mkdir()
            publish_checkpoint(tmp_path / run / "checkpoint-8", writer(8, "old"))
        one, other = (tmp_path / run / "checkpoint-8" / MANIFEST_FILE for run in ("a", "b"))
        assert one.read_bytes() == other.read_bytes()

    def test_files_that_are_put_are_flushed_while_others_are_written(self, tmp_path: Path) -> None:
        disk = FaultyDisk()

        def fill(draft: Draft) -> None:
            for name, content in content_of(8, "old").items():
                draft.put(name, [content[:10], memoryview(content)[10:]])
                while f"sync {name}" not in disk.operations:
                    time.sleep(0.01)

        (tmp_path / "one").mkdir()
        (tmp_path / "other").mkdir()
        publish_checkpoint(tmp_path / "one" / "checkpoint-8", fill, disk)
        publish_checkpoint(tmp_path / "other" / "checkpoint-8", writer(8, "old"))
        one, other = (tmp_path / name / "checkpoint-8" / MANIFEST_FILE for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
        assert faults_of(tmp_path / "one" / "checkpoint-8") == ()

    @pytest.mark.parametrize("size", [1000, 2000])
    def test_a_file_must_not_change_once_it_was_put(self, tmp_path: Path, size: int) -> None:
        def fill(draft: Draft) -> None:
            draft.put("state.json", [bytes(1000)])
            draft.sha256_of("state.json")
            path = draft.folder / "state.json"
            before = path.stat().st_mtime_ns
            while path.stat().st_mtime_ns == before:
                path.write_bytes(b"x" * size)

        with pytest.raises(AssertionError, match="written to after it was finished"):
            publish_checkpoint(tmp_path / "checkpoint-8", fill)
        assert names_in(tmp_path) == []

    def test_a_hash_that_is_known_is_taken_and_proved_wrong_on_reading(
        self, tmp_path: Path
    ) -> None:
        folder = tmp_path / "checkpoint-8"
        known = hashlib.sha256(b"content").hexdigest()
        publish_checkpoint(folder, lambda draft: draft.put("right", [b"content"], known))
        assert faults_of(folder) == ()
        publish_checkpoint(folder, lambda draft: draft.put("wrong", [b"another"], known))
        assert faults_of(folder) == ("wrong is not what was written: its SHA-256 differs",)

    def test_many_small_and_large_parts_are_one_file(self, tmp_path: Path) -> None:
        parts = [bytes([number % 256]) * (number * 37 % 5000) for number in range(1500)]
        parts.insert(700, os.urandom(3_000_000))

        def fill(draft: Draft) -> None:
            draft.put("all", parts)
            assert draft.sha256_of("all") == hashlib.sha256(b"".join(parts)).hexdigest()

        publish_checkpoint(tmp_path / "checkpoint-8", fill)
        assert (tmp_path / "checkpoint-8" / "all").read_bytes() == b"".join(parts)

    def test_every_file_can_be_read_by_whom_the_umask_lets(self, tmp_path: Path) -> None:
        def write(draft: Draft) -> None:
            (draft.folder / "private").touch(mode=0o600)
            (draft.folder / "plain").touch()
            draft.put("put", [b""])

        publish_checkpoint(tmp_path / "checkpoint-8", write)
        modes = {path.stat().st_mode for path in (tmp_path / "checkpoint-8").iterdir()}
        assert len(modes) == 1

    def test_the_same_step_again_replaces_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint-8"
        publish_checkpoint(folder, writer(8, "old"))
        publish_checkpoint(folder, writer(8, "new"))
        assert names_in(tmp_path) == ["checkpoint-8"]
        assert (folder / "state.json").read_bytes() == content_of(8, "new")["state.json"]

    def test_a_damaged_one_is_replaced_too(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint-8"
        folder.mkdir()
        publish_checkpoint(folder, writer(8, "new"))
        assert names_in(tmp_path) == ["checkpoint-8"]
        assert faults_of(folder) == ()

    @pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError, RuntimeError, SystemExit])
    def test_a_fault_of_ours_stays_what_it_is(
        self, tmp_path: Path, fault: type[BaseException]
    ) -> None:
        def write(draft: Draft) -> None:
            writer(12, "new")(draft)
            raise fault("of our own")

        prepare(tmp_path / "run")
        with pytest.raises(fault, match="of our own"):
            publish_checkpoint(tmp_path / "run" / "checkpoint-12", write)
        assert names_in(tmp_path / "run") == ["checkpoint-4", "checkpoint-8"]

    def test_folders_in_a_checkpoint_are_a_fault_of_ours(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="flat files only"):
            publish_checkpoint(
                tmp_path / "checkpoint-8", lambda draft: (draft.folder / "x").mkdir()
            )
        assert names_in(tmp_path) == []


class TestFinding:
    def test_newest_first_by_number(self, tmp_path: Path) -> None:
        for name in ("checkpoint-9", "checkpoint-100", "checkpoint-0", "checkpoint-20"):
            (tmp_path / name).mkdir()
        assert [path.name for path in find_checkpoints(tmp_path)] == [
            "checkpoint-100",
            "checkpoint-20",
            "checkpoint-9",
            "checkpoint-0",
        ]

    @pytest.mark.parametrize(
        "name",
        [
            "checkpoint-x",
            "checkpoint-",
            "checkpoint-08",
            "checkpoint--8",
            "checkpoint-8.5",
            "checkpoint-8 (copy)",
            "checkpoint-8\n",
            "checkpoint-٨",
            "Checkpoint-8",
            ".checkpoint-8.0123456789abcdef0123456789abcdef.draft",
            "last-good",
        ],
    )
    def test_what_only_looks_alike_is_overlooked(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / "checkpoint-7").touch()
        assert find_checkpoints(tmp_path) == ()
        assert newest_whole(tmp_path).folder is None
        assert newest_whole(tmp_path).step == 0

    def test_no_folder_no_checkpoints(self, tmp_path: Path) -> None:
        assert find_checkpoints(tmp_path / "none") == ()
        assert clear_leftovers(tmp_path / "none") == ()

    def test_all_damaged_is_none_and_all_are_named(self, tmp_path: Path) -> None:
        prepare(tmp_path / "run")
        for folder in find_checkpoints(tmp_path / "run"):
            (folder / MANIFEST_FILE).unlink()
        found = newest_whole(tmp_path / "run")
        assert found.folder is None
        assert [folder.name for folder, _ in found.damaged] == ["checkpoint-8", "checkpoint-4"]


class TestRotating:
    @pytest.fixture
    def run_folder(self, tmp_path: Path) -> Path:
        for step in (1, 2, 3, 4, 5):
            publish_checkpoint(tmp_path / f"checkpoint-{step}", writer(step, "old"))
        return tmp_path

    @pytest.mark.parametrize(
        ("keep", "protected", "kept"),
        [
            (None, None, [1, 2, 3, 4, 5]),
            (9, None, [1, 2, 3, 4, 5]),
            (5, None, [1, 2, 3, 4, 5]),
            (2, None, [4, 5]),
            (1, None, [5]),
            (3, 1, [1, 4, 5]),
            (2, 1, [1, 5]),
            (1, 1, [1, 5]),
            (2, 5, [4, 5]),
            (1, 5, [5]),
            (5, 1, [1, 2, 3, 4, 5]),
        ],
    )
    def test_the_newest_and_the_best_stay(
        self, run_folder: Path, keep: int | None, protected: int | None, kept: list[int]
    ) -> None:
        best = run_folder / f"checkpoint-{protected}" if protected else None
        before = names_in(run_folder)
        deleted = rotate(run_folder, keep, best)
        assert names_in(run_folder) == [f"checkpoint-{step}" for step in kept]
        assert sorted(path.name for path in deleted) == sorted({*before} - {*names_in(run_folder)})

    def test_a_protected_one_that_is_not_there_takes_no_place(self, run_folder: Path) -> None:
        rotate(run_folder, 2, run_folder / "checkpoint-99")
        assert names_in(run_folder) == ["checkpoint-4", "checkpoint-5"]

    def test_damaged_ones_take_no_place(self, run_folder: Path) -> None:
        for step in (2, 4, 5):
            (run_folder / f"checkpoint-{step}" / "state.json").write_bytes(b"")
        rotate(run_folder, 2, None)
        kept = ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]
        assert names_in(run_folder) == kept
        rotate(run_folder, 1, None)
        assert names_in(run_folder) == kept[2:]

    def test_a_flipped_byte_is_damage_here_too(self, run_folder: Path) -> None:
        path = run_folder / "checkpoint-5" / "state.json"
        path.write_bytes(path.read_bytes().replace(b"5", b"6"))
        rotate(run_folder, 1, None)
        assert names_in(run_folder) == ["checkpoint-4", "checkpoint-5"]

    def test_where_all_are_damaged_none_is_deleted(self, run_folder: Path) -> None:
        for folder in find_checkpoints(run_folder):
            (folder / MANIFEST_FILE).unlink()
        assert rotate(run_folder, 1, None) == ()

    def test_a_damaged_best_one_is_still_never_deleted(self, run_folder: Path) -> None:
        (run_folder / "checkpoint-1" / MANIFEST_FILE).unlink()
        rotate(run_folder, 2, run_folder / "checkpoint-1")
        assert names_in(run_folder) == ["checkpoint-1", "checkpoint-4", "checkpoint-5"]


class TestLeftovers:
    HEX = "0123456789abcdef0123456789abcdef"

    @pytest.mark.parametrize(
        "name",
        [
            f".checkpoint-12.{HEX}.draft",
            f".checkpoint-4.{HEX}.removed",
            f".checkpoint-8.{HEX}.replaced",
            f".adapter.{HEX}.draft",
            f".last-good.{HEX}.draft",
        ],
    )
    def test_are_cleared(self, tmp_path: Path, name: str) -> None:
        run_folder = tmp_path / "run"
        prepare(run_folder)
        (run_folder / name).mkdir()
        (run_folder / name / "half").touch()
        assert clear_leftovers(run_folder) == (run_folder / name,)
        assert names_in(run_folder) == ["checkpoint-4", "checkpoint-8"]

    @pytest.mark.parametrize("name", ["checkpoint-12", "adapter"])
    def test_what_was_about_to_be_replaced_returns(self, tmp_path: Path, name: str) -> None:
        aside = tmp_path / f".{name}.{self.HEX}.replaced"
        aside.mkdir()
        (aside / "content").write_text("kept")
        (tmp_path / f".{name}.{self.HEX}.draft").mkdir()
        clear_leftovers(tmp_path)
        assert names_in(tmp_path) == [name]
        assert (tmp_path / name / "content").read_text() == "kept"

    @pytest.mark.parametrize(
        "name", [".lock", ".merged.x.draft", f".merged.{HEX}.draft", ".checkpoint-4.draft", "x"]
    )
    def test_what_is_not_ours_to_clear_stays(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).mkdir()
        assert clear_leftovers(tmp_path) == ()
        assert names_in(tmp_path) == [name]


def test_the_manifest_can_be_read_by_anyone(tmp_path: Path) -> None:
    """Plain JSON, so that a user can check the hashes with any tool."""
    publish_checkpoint(tmp_path / "checkpoint-8", writer(8, "old"))
    values = json.loads((tmp_path / "checkpoint-8" / MANIFEST_FILE).read_text())
    assert values["files"].keys() == content_of(8, "old").keys()


def test_what_killed_processes_left_of_other_files_is_cleared_away(tmp_path: Path) -> None:
    kept = ["adapter", "data/ledger.json", "merged", "recipe.yaml", ".lock"]
    left = [
        ".recipe.yaml.12",
        ".summary.json.12",
        "data/.ledger.json.12",
    ]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(clear_leftovers(tmp_path)) == sorted(tmp_path / name for name in left)
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(tmp_path)) for path in files) == sorted(kept)
