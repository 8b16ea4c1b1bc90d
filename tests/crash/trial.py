"""What happens to a run, one thing after the other, and what must be true afterwards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from crash.case import Blow, Case
from crash.forks import Attempt, Zygote
from crash.outcome import differences, outcome_of
from qlora_kit.checkpoint.checkpoints import newest_whole

FAULTS = ("kill", "kill", "kill", "kill", "kill later", "kill later", "kill by the clock")
GENTLE = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGINT twice")
DISK = ("full disk", "I/O error", "short write")
# Of the library call with another disk; half-way through an operation and behind it as well.
DEEP = ("kill", "kill half-way", "kill after", "full disk", "I/O error", "short write")
SILENT = "silent short write"


def draw_blows(random: Random, case: Case) -> list[Blow]:
    """One to three, each at some place of what is left of the run."""
    return [_draw_blow(random, case) for _ in range(random.choice([1, 1, 1, 2, 2, 3]))]


def _draw_blow(random: Random, case: Case) -> Blow:
    kind = random.choices(["kill", "gentle", "disk", "deep"], [50, 14, 16, 20])[0]
    places = list(case.places().values())
    at = random.randint(1, len(case.operations))
    if random.random() < 0.6:  # most operations are of saves
        at = random.choice(random.choice(places))
    if kind == "deep" and not case.disk_operations:
        kind = "kill"
    if kind == "kill":
        fault = random.choice(FAULTS)
        if fault == "kill by the clock":
            return Blow("clock", 0, "kill", random.uniform(0.05, 1.0) * case.seconds)
        delay = random.choice([0.001, 0.01, 0.1, 0.3]) if fault == "kill later" else 0.0
        return Blow("files", at, "kill", delay)
    if kind == "gentle":
        fault = random.choice(GENTLE)
        delays = [0.05, 1.2] if fault == "SIGINT twice" else [0.0, 0.0, 0.02, 0.1, 0.3]
        return Blow("files", at, fault, random.choice(delays))
    if kind == "disk":
        return Blow("files", at, random.choice(DISK))
    at = random.randint(1, max(len(case.disk_operations), 1))
    return Blow("disk", at, random.choice([*DEEP, SILENT]))


def strike(case: Case, blow: Blow, zygote: Zygote) -> Attempt:
    if blow.where == "clock":
        return zygote.run(case.order(**case.watch()), kill_after=blow.delay_seconds)
    if blow.where == "disk":
        told = str(case.folder / "told")
        disk = {"at": blow.at, "fault": blow.fault, "told": told}
        return zygote.run(case.order(disk=disk))
    watch = case.watch(at=blow.at, fault=blow.fault, delay_seconds=blow.delay_seconds)
    return zygote.run(case.order(**watch))


@dataclass(frozen=True)
class Verdict:
    """What is wrong after the blows and the attempts that follow, and which of them told."""

    wrong: list[str]
    landed: list[tuple[Blow, str]]
    """Those that ended an attempt, with the phase that it was in; the others came when it was over,
    or were of no account.
    """


def try_it(case: Case, blows: list[Blow], cold: bool, forks: list[Zygote]) -> Verdict:
    case.clear(cold)
    wrong: list[str] = []
    landed: list[tuple[Blow, str]] = []
    was_silent = any(blow.fault == SILENT for blow in blows)
    for number, blow in enumerate(blows):
        step, is_begun = newest_whole(case.run).step, (case.run / "recipe.yaml").exists()
        was_logged = case.is_training_logged
        done = strike(case, blow, forks[number % len(forks)])
        wrong += faults_in(done, blow, case, was_logged)
        wrong += restarted(done, step, is_begun)
        if newest_whole(case.run).step < step and not was_silent:
            wrong.append(f"checkpoint-{step} is gone, or damaged, after {blow}")
        if done.code != case.code:
            landed.append((blow, case.phase(blow)))
        if (case.run / "summary.json").exists():
            break
    step, is_begun = newest_whole(case.run).step, (case.run / "recipe.yaml").exists()
    if not (case.run / "summary.json").exists():
        done = forks[0].run(case.order(**case.watch()))
        if done.code != case.code or not (case.run / "summary.json").exists():
            wrong.append(f"it does not go on ({done.code}): {done.out[-600:]}{done.err[-1500:]}")
            return Verdict(wrong, landed)
        wrong += restarted(done, step, is_begun)
    again = forks[0].run(case.order(**case.watch()))
    if "is finished" not in again.out or again.code != case.code:
        wrong.append(f"it does not know that it is finished: {again.out[-500:]}{again.err[-500:]}")
    wrong += differences(case.expected, outcome_of(case.run))
    return Verdict(wrong, landed)


def restarted(done: Attempt, step: int, is_begun: bool) -> list[str]:
    """Where there was a checkpoint, it must be said that training goes on from it."""
    if "schedule " not in done.out:  # it did not come as far
        return []
    if step and f"checkpoint-{step} is whole; training goes on" not in done.out:
        return [f"checkpoint-{step} was there, and is not gone on from: {done.out[:600]}"]
    if is_begun and "holds a run that did not end" not in done.out:
        return [f"the run that was begun is not spoken of: {done.out[:600]}"]
    return []


def faults_in(done: Attempt, blow: Blow, case: Case, was_logged: bool) -> list[str]:
    """Whether an attempt ended as such a blow must end it."""
    wrong = []
    is_noisy = "Traceback" in done.err or "Exception ignored" in done.err
    if is_noisy and blow.fault != "SIGINT twice":  # the second may meet the interpreter's exit
        wrong.append(f"a traceback after {blow}: {done.err[-2500:]}")
    if done.code == case.code and (case.run / "summary.json").exists():
        return wrong  # it was over before, or did not mind
    if blow.fault.startswith("kill"):
        allowed = (-9, -14)
    elif blow.fault == "SIGTERM":
        allowed = (143, -15)
    elif "SIGINT" in blow.fault:
        allowed = (130,)
    else:
        allowed = (1,)
        if "error: " not in done.err:
            wrong.append(f"no message after {blow}: {done.out[-300:]}{done.err[-300:]}")
    if done.code not in allowed:
        wrong.append(f"exit code {done.code} after {blow}: {done.out[-300:]}{done.err[-900:]}")
    said = re.search(r"holds (checkpoint-\d+)", done.out)
    is_gentle = done.code in (130, 143) and blow.fault != "SIGINT twice"
    has_trained = case.is_training_logged and not was_logged
    if is_gentle and has_trained and not case.keeps_nothing and not said:
        wrong.append(f"stopped, and no checkpoint: {done.out[-400:]}")
    if said and not (case.run / said[1]).is_dir():
        wrong.append(f"{said[1]} is told of, and not there")
    return wrong
