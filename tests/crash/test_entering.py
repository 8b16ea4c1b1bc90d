"""What `train` does in a folder that holds a run: a changed recipe, a finished run, --fresh."""

from __future__ import annotations

from pathlib import Path

import pytest

from crash.case import Blow, Case
from crash.forks import Attempt, Zygote
from crash.outcome import checkpoints_in
from crash.trial import strike


@pytest.fixture(scope="module")
def stopped(case: Case, forks: list[Zygote]) -> Case:
    """A run that was killed in its fifth update."""
    case.clear(cold=False)
    strike(case, Blow("files", case.places()["log"][-3], "kill"), forks[0])
    assert checkpoints_in(case.run)
    return case


def train(case: Case, forks: list[Zygote], *more: str, **watch: object) -> Attempt:
    order = case.order(**case.watch(**watch))
    order["arguments"] += more
    return forks[0].run(order)


def content_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_what_would_break_the_run_is_refused_and_nothing_is_touched(
    stopped: Case, forks: list[Zygote]
) -> None:
    before = content_of(stopped.run)
    refused = train(stopped, forks, "train.seed=1", "lora.r=8", "train.logging_steps=2")
    assert refused.code == 1
    assert "was begun otherwise" in refused.err
    for word in ("lora.r: 4 → 8", "train.seed: ", "--allow-drift", "--fresh"):
        assert word in refused.err
    assert "logging_steps" not in refused.err
    after = content_of(stopped.run)
    assert {name for name in after if not name.endswith(".lock")} <= before.keys()
    assert all(before[name] == content for name, content in after.items() if name in before)


def test_changes_that_it_can_go_on_with_are_listed(stopped: Case, forks: list[Zygote]) -> None:
    gone_on = train(stopped, forks, "train.save_total_limit=3", at=9, fault="SIGTERM")
    assert "accepted:\n  - train.save_total_limit: 1 → 3" in gone_on.out
    assert "training goes on from there" in gone_on.out


@pytest.mark.slow
def test_drift_is_named_then_finished_is_said_and_fresh_deletes_nothing(
    stopped: Case, forks: list[Zygote]
) -> None:
    other = ("train.save_total_limit=3", "train.weight_decay=0.5")
    drifted = train(stopped, forks, *other, "--allow-drift")
    assert drifted.code in (0, 1)
    assert "train.weight_decay" in drifted.out
    assert "no uninterrupted run does both" in drifted.out
    before = content_of(stopped.run)
    assert "is finished; --fresh trains again" in train(stopped, forks, *other).out
    refused = train(stopped, forks)
    assert (refused.code, "already holds a finished run" in refused.err) == (1, True)
    fresh = train(stopped, forks, "--fresh", "train.max_steps=1", "train.warmup_steps=0")
    assert f"--fresh trains into {stopped.run}-2" in fresh.out
    assert (stopped.folder / "run-2" / "summary.json").exists()
    assert content_of(stopped.run) == before
