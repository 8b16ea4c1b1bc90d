"""The log, on a disk that takes it and on one that is full."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from qlora_kit.errors import DiskError
from qlora_kit.processes import ALONE, Processes
from qlora_kit.report.reporter import SILENT
from qlora_kit.train.callbacks import StepCallback
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.snapshot import Progress

T = TypeVar("T")
FULL = Path("/dev/full")


@dataclass(frozen=True)
class Pair(Processes):
    """One of two; what it gives to an exchange is kept, and what the first one gave is got."""

    count: int = 2
    given: list[Any] = field(default_factory=list)

    def gathered(self, value: T) -> list[T]:
        self.given.append(value)
        return [self.given[0], value]


def log(path: Path, processes: Processes, **logs: float) -> Progress:
    callback = StepCallback(path, MemoryWatch("cpu"), SILENT, 10, processes)
    progress = Progress(update=3, log_bytes=7)
    callback.trainer = SimpleNamespace(progress=progress)  # type: ignore[assignment]
    state: Any = SimpleNamespace(global_step=3, epoch=0.3)
    callback.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]
    return progress


def test_a_line_is_written_and_counted_but_the_closing_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    progress = log(path, ALONE, loss=0.5)
    assert json.loads(path.read_text())["loss"] == 0.5
    assert progress.log_bytes == path.stat().st_size
    assert log(path, ALONE, train_loss=0.5).log_bytes == 7


def test_a_full_disk_names_the_log() -> None:
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        log(FULL, ALONE, loss=0.5)


def test_a_full_disk_ends_every_process_with_one_message() -> None:
    exchanged: list[Any] = []
    for rank in (0, 1):
        with pytest.raises(DiskError, match=r"No space left on device \(/dev/full\)") as told:
            log(FULL, Pair(rank=rank, given=exchanged), loss=0.5)
        assert told.value.is_told_elsewhere == (rank == 1)
