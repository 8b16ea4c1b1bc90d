"""No save loses a run: not on a disk that fails or fills up, nor in a process that is killed."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import faulty_disk
import pytest
from faulty_disk import SCENARIOS, FaultyDisk, content_of, next_step, prepare, writer

from qlora_kit.checkpoint.checkpoints import (
    clear_leftovers,
    find_checkpoints,
    newest_whole,
    publish_checkpoint,
    require_room,
)
from qlora_kit.checkpoint.disk import Disk
from qlora_kit.checkpoint.manifest import faults_of
from qlora_kit.errors import CheckpointError

# What may be the newest whole checkpoint after a scenario was cut short, best first.
OUTCOMES = {"next step": [(12, "new"), (8, "old")], "same step": [(8, "new"), (8, "old")]}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def require_sound(run_folder: Path, scenario: str) -> int:
    """Nothing is lost and nothing is left over; the number of the outcome that came about."""
    clear_leftovers(run_folder)
    assert sorted(run_folder.iterdir()) == sorted(find_checkpoints(run_folder))
    assert all(faults_of(path) == () for path in run_folder.iterdir())
    found = newest_whole(run_folder)
    assert found.folder is not None
    assert found.damaged == ()
    for number, (step, version) in enumerate(OUTCOMES[scenario]):
        content = {name: (found.folder / name).read_bytes() for name in content_of(step, version)}
        if found.step == step and content == content_of(step, version):
            return number
    raise AssertionError(f"{found.folder.name} holds something else")


def count_operations(scenario: str, folder: Path) -> int:
    disk = FaultyDisk()
    prepare(folder)
    SCENARIOS[scenario](folder, disk)
    assert require_sound(folder, scenario) == 0
    return len(disk.operations)


def what_is_said(scenario: str, run_folder: Path, disk: Disk) -> str:
    """The message that a scenario ends with; empty where it goes through."""
    try:
        SCENARIOS[scenario](run_folder, disk)
    except CheckpointError as error:
        return str(error)
    return ""


class TestADiskThatFails:
    @pytest.mark.parametrize("scenario", SCENARIOS)
    @pytest.mark.parametrize(
        "fault", ["full disk", "I/O error", "short write", "silent short write"]
    )
    def test_at_any_operation_loses_nothing(
        self, tmp_path: Path, scenario: str, fault: faulty_disk.Fault
    ) -> None:
        outcomes = []
        for at in range(1, count_operations(scenario, tmp_path / "whole") + 1):
            run_folder = tmp_path / str(at)
            prepare(run_folder)
            said = what_is_said(scenario, run_folder, FaultyDisk(at, fault))
            if said:
                newest = newest_whole(run_folder).folder
                assert newest is not None
                assert newest.name != "checkpoint-4", "not even until the next start"
                assert f"{newest.name} is whole: make room" in said
                assert "could not be " in said
                assert os.strerror(errno.ENOSPC) in said or fault != "full disk"
            outcomes.append(require_sound(run_folder, scenario))
        assert 0 in outcomes
        assert 1 in outcomes

    @pytest.mark.parametrize("scenario", SCENARIOS)
    @pytest.mark.parametrize("way", ["kill", "kill half-way", "kill after"])
    def test_a_kill_at_any_operation_loses_nothing(
        self, tmp_path: Path, scenario: str, way: str
    ) -> None:
        done = subprocess.run(
            [sys.executable, faulty_disk.__file__, scenario, way, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        num_operations = int(done.stdout)
        assert num_operations == count_operations(scenario, tmp_path / "counted")
        assert num_operations >= 10
        outcomes = [
            require_sound(tmp_path / str(at), scenario) for at in range(1, num_operations + 1)
        ]
        assert outcomes == sorted(outcomes, reverse=True), "first the old one, then the new one"
        assert set(outcomes) == {0, 1}

    def test_a_draft_that_cannot_be_removed_goes_at_the_next_start(self, tmp_path: Path) -> None:
        class StuckDisk(Disk):
            def remove(self, path: Path) -> None:
                raise PermissionError(errno.EACCES, "not yours")

            def sync(self, path: Path) -> None:
                raise OSError(errno.EIO, "input/output error")

        run_folder = tmp_path / "run"
        prepare(run_folder)
        with pytest.raises(CheckpointError, match=r"input/output error .* checkpoint-8 is whole"):
            next_step(run_folder, StuckDisk())
        assert len(names_in(run_folder)) == 3
        (cleared,) = clear_leftovers(run_folder)
        assert cleared.name.endswith(".draft")
        assert names_in(run_folder) == ["checkpoint-4", "checkpoint-8"]

    def test_the_first_checkpoint_has_none_before_it(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No whole checkpoint is there yet"):
            publish_checkpoint(
                tmp_path / "checkpoint-8", writer(8, "new"), FaultyDisk(1, "full disk")
            )
        assert names_in(tmp_path) == []

    def test_no_room_is_said_before_the_write(self, tmp_path: Path) -> None:
        class SmallDisk(Disk):
            def free_bytes(self, folder: Path) -> int:
                return 999

        require_room(tmp_path, 999, SmallDisk())
        with pytest.raises(CheckpointError, match=r"1,000 bytes needed, 999 free. No whole"):
            require_room(tmp_path, 1000, SmallDisk())

    def test_a_disk_that_does_not_say_how_much_room_there_is(self, tmp_path: Path) -> None:
        class DumbDisk(Disk):
            def free_bytes(self, folder: Path) -> int:
                raise OSError(errno.EIO, "input/output error")

        prepare(tmp_path / "run")
        said = (
            r"next checkpoint could not be begun in .*: input/output error. checkpoint-8 is whole"
        )
        with pytest.raises(CheckpointError, match=said):
            require_room(tmp_path / "run", 1, DumbDisk())

    def test_a_folder_that_cannot_be_read_any_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare(tmp_path / "run")
        said = r"could not be written .*run cannot be read any more \(Input/output error\)"

        def refuse(folder: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

        monkeypatch.setattr("qlora_kit.checkpoint.checkpoints.find_checkpoints", refuse)
        with pytest.raises(CheckpointError, match=said):
            next_step(tmp_path / "run", FaultyDisk(1, "I/O error"))


# Publishes checkpoint-12 by torch, safetensors and Python, on a disk that does not take it.
FILLING = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from qlora_kit.checkpoint.checkpoints import publish_checkpoint
from qlora_kit.errors import CheckpointError

run_folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
tensors = {f"weight {number}": torch.zeros(100, 100) for number in range(10)}
for write in (
    lambda draft: torch.save(tensors, draft.folder / "optimizer.pt"),
    lambda draft: save_file(tensors, draft.folder / "adapter_model.safetensors"),
    lambda draft: (draft.folder / "state.json").write_bytes(bytes(400_000)),
):
    try:
        publish_checkpoint(run_folder / "checkpoint-12", write)
    except CheckpointError as error:
        print(error)
    print(sorted(path.name for path in run_folder.iterdir()))
"""
REFUSALS = [
    r"the disk did not take everything \(torch: .*\)",
    r"File too large|No space left on device",
    r"File too large|No space left on device",
]


class TestARealDisk:
    def test_that_takes_no_larger_files(self, tmp_path: Path) -> None:
        prepare(tmp_path / "run")
        require_refusals(lines_of([sys.executable, "-c", FILLING, f"{tmp_path}/run", "100000"]))

    def test_that_is_full(self, tmp_path: Path) -> None:
        """A file system of 256 KiB, that only this process sees."""
        disk, source = tmp_path / "disk", tmp_path / "source"
        disk.mkdir()
        prepare(source / "run")
        shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        mount = f"mount -t tmpfs -o size=256k none {disk}"
        try:
            subprocess.run([*shell, mount], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no file system can be mounted here")
        script = f'{mount} && cp -r {source}/run {disk} && exec "$@"'
        filling = [sys.executable, "-c", FILLING, f"{disk}/run", "0"]
        require_refusals(lines_of([*shell, script, "sh", *filling]))


def lines_of(command: list[str]) -> list[str]:
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def require_refusals(lines: list[str]) -> None:
    """Three messages, each followed by what is in the folder."""
    assert lines[1::2] == ["['checkpoint-4', 'checkpoint-8']"] * 3
    for line, refusal in zip(lines[::2], REFUSALS, strict=True):
        assert re.search(
            rf"checkpoint-12 could not be written in .*: ({refusal}) \(.* free\)", line
        )
        assert "checkpoint-8 is whole: make room or mend the disk" in line
