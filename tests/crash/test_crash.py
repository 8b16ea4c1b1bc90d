"""Some of what `make crash-test` does hundreds of times, on one recipe and on a few by chance."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crash.case import PHASES, Blow, Case, prepare_case
from crash.forks import Zygote
from crash.outcome import checkpoints_in, differences, outcome_of
from crash.trial import draw_blows, try_it

PATIENCE_SECONDS = 120


def middle_of(case: Case, phase: str) -> int:
    numbers = case.places()[phase]
    return numbers[len(numbers) // 2]


def test_a_run_that_is_killed_in_every_phase_is_the_run_that_was_not(
    case: Case, forks: list[Zygote]
) -> None:
    """One after the other, from reading the model to writing the summary, in one run."""
    assert set(PHASES) <= set(case.places()), "this recipe has every phase"
    blows = [Blow("files", middle_of(case, phase), "kill") for phase in PHASES]
    assert try_it(case, sorted(blows, key=lambda blow: blow.at), True, forks).wrong == []


def test_a_disk_that_fails_in_a_save_ends_with_a_message_and_loses_nothing(
    case: Case, forks: list[Zygote]
) -> None:
    assert "sync log.jsonl" in case.disk_operations
    place = len(case.disk_operations) // 2
    faults = ("I/O error", "full disk", "silent short write", "kill half-way")
    blows = [Blow("disk", place - number, fault) for number, fault in enumerate(faults)]
    assert try_it(case, blows, False, forks).wrong == []


@pytest.mark.slow
def test_by_chance(tmp_path: Path, tiny_llama: Path, forks: list[Zygote]) -> None:
    """On a recipe that was never tried, perhaps."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    case = prepare_case(tmp_path / "case", tiny_llama, seed, forks[0])
    for _ in range(2):
        blows = draw_blows(drawn, case)
        assert try_it(case, blows, drawn.random() < 0.5, forks).wrong == [], (seed, blows)


def test_signals_save_and_end_with_their_own_code(case: Case, forks: list[Zygote]) -> None:
    """In training, before the evaluation that is made up for, once it is, and after training."""
    case.clear(cold=False)
    for place, name, code, saved in (
        ("log.jsonl", "SIGTERM", 143, "checkpoint-2"),
        ("log.jsonl", "SIGINT", 130, "checkpoint-2"),
        ("log.jsonl", "SIGINT", 130, "checkpoint-3"),
        ("evaluation.json", "SIGTERM", 143, "checkpoint-6"),
    ):
        watch = case.watch(at=1, fault=name, only=place)
        ended = forks[0].run(case.order(**watch))
        assert ended.code == code, ended
        assert f"stopped by {name}. {case.run} holds {saved}. The same command goes on" in ended.out
    again = forks[0].run(case.order(**case.watch()))
    assert f"{saved} is whole; training goes on from there" in again.out
    assert differences(case.expected, outcome_of(case.run)) == []


def test_usr1_and_a_file_save_and_training_goes_on(case: Case, forks: list[Zygote]) -> None:
    case.clear(cold=False)
    forks[0].run(case.order(**case.watch(at=1, fault="kill", only="log.jsonl")))
    (case.run / "save-now").touch()
    order = case.order(**case.watch(at=3, fault="SIGUSR1", only="log.jsonl"))
    order["arguments"].append("train.save_total_limit=null")
    assert forks[0].run(order).code == case.code
    # By the file after the first update, by the signal after the third.
    assert checkpoints_in(case.run) == [f"checkpoint-{step}" for step in (1, 2, 3, 4, 6)]
    assert not (case.run / "save-now").exists()


def test_a_process_of_its_own(case: Case, forks: list[Zygote]) -> None:
    """Nothing is forked: `python -m qlora_kit train`, killed and gone on with."""
    case.clear(cold=True)
    first = begin(case)
    wait_for_checkpoint(case, first)
    os.kill(first.pid, signal.SIGSTOP)
    refused = forks[0].run(case.order(**case.watch()))
    assert refused.code == 1
    assert f"process {first.pid} has been training in {case.run}" in refused.err
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    second = begin(case)
    out, err = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == case.code, err
    assert "is whole; training goes on from there" in out
    assert err == "", "noise reaches the user"
    assert differences(case.expected, outcome_of(case.run)) == []


def begin(case: Case) -> subprocess.Popen[str]:
    environment = {"OMP_NUM_THREADS": "1", "QLORA_KIT_CACHE": str(case.cache)}
    # The run that it is held against had the heap as it is, and foretold what that takes.
    environment["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=7"
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_kit", "train", str(case.recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_checkpoint(case: Case, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not (case.run.is_dir() and checkpoints_in(case.run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
