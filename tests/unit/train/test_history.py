"""The log of a run that goes on: all lines up to the checkpoint, whatever became of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.train.history import (
    HISTORY_FILE,
    begin_history,
    cut_log,
    history,
    put_history_back,
)

KEPT = b'{"step": 1}\n{"step": 2}\n'


def test_cutting_the_log_says_whether_it_is_all_there(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert cut_log(log, 0)
    assert not cut_log(log, 3)
    log.write_bytes(b"12345")
    assert cut_log(log, 3)
    assert log.read_bytes() == b"123"
    assert not cut_log(log, 4)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Of a run that has one checkpoint."""
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / HISTORY_FILE).write_bytes(KEPT)
    return tmp_path / "log.jsonl"


def test_a_checkpoint_keeps_the_lines_before_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert history(log, 5) == b""
    log.write_bytes(KEPT + b"more")
    assert history(log, len(KEPT)) == KEPT


@pytest.mark.parametrize("behind", [b"", b'{"step": 3}\n', b'{"st'])
def test_lines_behind_a_checkpoint_go(log: Path, behind: bytes) -> None:
    log.write_bytes(KEPT + behind)
    assert put_history_back(log, log.parent / "checkpoint-2", len(KEPT)) is None
    assert log.read_bytes() == KEPT


@pytest.mark.parametrize("left", [None, b"", KEPT[:-5]])
def test_lines_that_are_gone_come_back(log: Path, left: bytes | None) -> None:
    if left is not None:
        log.write_bytes(left)
    told = put_history_back(log, log.parent / "checkpoint-2", len(KEPT))
    assert told is not None
    assert "were gone from it, and are put back" in told
    assert log.read_bytes() == KEPT
    assert sorted(one.name for one in log.parent.iterdir()) == ["checkpoint-2", "log.jsonl"]


def test_a_log_that_was_changed_is_kept_aside(log: Path) -> None:
    changed = KEPT.replace(b"1", b"7") + b"more"
    for name in ("log.jsonl.aside", "log.jsonl.aside-2"):
        log.write_bytes(changed)
        told = put_history_back(log, log.parent / "checkpoint-2", len(KEPT))
        assert told is not None
        assert f"kept as {name}," in told
        assert (log.with_name(name).read_bytes(), log.read_bytes()) == (changed, KEPT)


def test_a_checkpoint_that_keeps_no_lines_says_how_long_the_log_was(tmp_path: Path) -> None:
    """As those that an older version wrote."""
    log = tmp_path / "log.jsonl"
    log.write_bytes(KEPT + b"more")
    assert put_history_back(log, tmp_path, len(KEPT)) is None
    assert log.read_bytes() == KEPT
    told = put_history_back(log, tmp_path, len(KEPT) + 1)
    assert told is not None
    assert "are gone from it" in told


def test_where_all_checkpoints_are_damaged_the_log_is_kept_as_they_are(log: Path) -> None:
    log.write_bytes(KEPT)
    (log.parent / "checkpoint-2").rename(log.parent / "checkpoint-2.damaged")
    told = begin_history(log)
    assert told is not None
    assert "log.jsonl.aside" in told
    assert log.with_name("log.jsonl.aside").read_bytes() == KEPT
    assert not log.exists()
    assert begin_history(log) is None


def test_lines_of_a_run_that_came_to_no_checkpoint_are_made_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert begin_history(log) is None
    log.write_bytes(KEPT)
    assert begin_history(log) is None
    assert log.read_bytes() == b""
