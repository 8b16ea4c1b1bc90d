"""A small disk that is filled up while a run writes to it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crash.case import Case
from crash.faults import FILLER
from crash.forks import Zygote, zygotes
from crash.outcome import differences, outcome_of

# What is first written to once the disk is full, and what the message then names.
PLACES = {
    "ledger.json": "data/ledger.json",
    "log.jsonl": "log.jsonl",
    ".checkpoint-2": "checkpoint-2",
    ".adapter": "adapter",
    "evaluation.json": "evaluation.json",
    ".merged": "merged",
    "summary.json": "summary.json",
}
SHELL = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


@pytest.fixture
def small(case: Case, tmp_path: Path) -> Iterator[Zygote]:
    """A process that sees a disk of 120 MB in the place of the case's folder."""
    mount = f"mount -t tmpfs -o size=120m none {case.folder}"
    try:
        subprocess.run([*SHELL, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    case.clear(cold=False)
    copy = tmp_path / "copy"
    script = f'cp -r {case.folder} {copy} && {mount} && cp -r {copy}/. {case.folder} && exec "$@"'
    with zygotes(1, within=(*SHELL, script, "sh")) as started:
        yield started[0]


@pytest.mark.slow
def test_whatever_does_not_fit_is_told_and_nothing_is_lost(
    case: Case, small: Zygote, tmp_path: Path
) -> None:
    """One place after the other, in one run, which then comes to the end that it would have had."""
    disk = Path(f"/proc/{small.process.pid}/root{case.folder}")
    said = {"out": str(tmp_path / "out"), "err": str(tmp_path / "err")}
    for place, named in PLACES.items():
        watch = case.watch(at=1, fault="fill", only=place)
        watch["watch"]["folders"] = [str(case.run)]
        ended = small.run(case.order(**watch, **said))
        assert ended.code == 1, (place, ended)
        assert re.fullmatch(r"error: .*\n", ended.err), (place, ended.err)
        assert re.search(rf"{named}\b.*(No space left on device|free)|device .*{named}", ended.err)
        assert re.search(
            r"checkpoint-\d+ is whole|holds (checkpoint-\d+|no checkpoint)|No whole "
            r"checkpoint is there yet",
            ended.err,
        ), (place, ended.err)
        (disk / FILLER).unlink()
    last = small.run(case.order(**case.watch(), **said))
    assert last.code == case.code, last
    assert differences(case.expected, outcome_of(disk / "run")) == []
