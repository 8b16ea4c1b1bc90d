"""Putting a checkpoint back, on one of several processes that cannot read it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from qlora_kit.errors import RunError
from qlora_kit.processes import Processes
from qlora_kit.train import continuation, snapshot
from qlora_kit.train.continuation import Continuation, GoOn
from qlora_kit.train.snapshot import RANDOM_FILE, Progress, Shared, read_random_state

T = TypeVar("T")


@dataclass(frozen=True)
class Second(Processes):
    """Rank 1 of two; the first one gives to each exchange what no fault has hindered."""

    rank: int = 1
    count: int = 2
    first: list[Any] = field(default_factory=list)

    def gathered(self, value: T) -> list[T]:
        return [self.first.pop(0), value]


def refuse(path: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def test_random_states_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    for content in (None, b"", b"no safetensors file"):
        if content is not None:
            (tmp_path / RANDOM_FILE).write_bytes(content)
        with pytest.raises(RunError, match=r"was whole and now cannot be read \(.*same command"):
            read_random_state(tmp_path, 0)


def test_one_that_cannot_read_them_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it in the first update."""
    monkeypatch.setattr(continuation, "moving_parts", lambda *_: None)
    monkeypatch.setattr(continuation, "read_snapshot", lambda *_: Progress(4))
    monkeypatch.setattr(snapshot, "load_values", refuse)
    exchanged = Second(first=[None, (None, None), None])
    begun = Continuation(tmp_path, Progress(4), Shared(4, 4, 8, 2, "an optimizer"))
    trainer: Any = SimpleNamespace(progress=None, hooks=None)
    go_on = GoOn(trainer, begun, exchanged, tmp_path / "log.jsonl", None)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="Input/output error") as told:
        go_on.on_train_begin(None, SimpleNamespace(global_step=0), None)  # type: ignore[arg-type]
    assert told.value.is_told_elsewhere
    assert exchanged.first == [], "the others have heard of it"
