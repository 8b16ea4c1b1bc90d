"""What the disk says, and who hears of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qlora_kit.checkpoint.run_directory import write_json
from qlora_kit.errors import DiskError
from qlora_kit.refusals import naming, refusal_of, said_by_the_disk


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN]
)
def test_a_disk_that_is_full_broken_or_gone(number: int) -> None:
    refusal = refusal_of(OSError(number, os.strerror(number), "/x/log.jsonl"))
    assert isinstance(refusal, DiskError)
    said = f"the disk refuses: {os.strerror(number)} (/x/log.jsonl). Make room or mend it."
    assert str(refusal) == said


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no"), RuntimeError("shapes"), SafetensorError("header")],
)
def test_faults_of_ours_are_none_of_its(error: Exception) -> None:
    assert said_by_the_disk(error) is refusal_of(error) is None


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(OSError, match=r"log\.jsonl") as caught, naming(path):
        raise full()
    assert said_by_the_disk(caught.value) == f"No space left on device ({path})"


def test_a_record_that_does_not_fit_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise full()

    monkeypatch.setattr("qlora_kit.checkpoint.run_directory.os.fsync", refuse)
    with pytest.raises(OSError, match=r"summary\.json"):
        write_json(tmp_path / "summary.json", {})
    assert list(tmp_path.iterdir()) == []
