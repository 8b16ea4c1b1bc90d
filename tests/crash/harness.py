"""Kills `train` hundreds of times, and sees that no run is lost, wrong or silently begun again.

make crash-test N=200 SEED=1

Every trial begins a run of some recipe, lets something happen to it once or several times in a row,
and then lets the same command go on until it has ended by itself. What is then in the run's folder
must be what the run has left that nothing happened to. A trial is told by its seed and number.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from conftest import build_llama
from crash.outcome import checkpoints_in, differences, outcome_of
from crash.recipes import write_case

from qlora_kit.checkpoint.checkpoints import newest_whole

_SECONDS = 300.0
_RECIPE_SEEDS = 10_000
TRIALS_PER_RECIPE = 6
FAULTS = ("kill", "kill", "kill", "kill", "kill later", "kill later", "kill by the clock")
GENTLE = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGINT twice")
DISK = ("full disk", "I/O error", "short write")
# Of the library call with another disk; half-way through an operation and behind it as well.
DEEP = ("kill", "kill half-way", "kill after", "full disk", "I/O error", "short write")
SILENT = "silent short write"


@dataclass(frozen=True)
class Blow:
    """What happens to one attempt: `fault`, at operation number `at` of those under `where`."""

    where: str
    """`files`: all of the run's and the cache's; `disk`: those of saving; `clock`: none."""
    at: int
    fault: str
    delay_seconds: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    code: int
    out: str
    err: str


@dataclass
class Zygote:
    """The process that forks the attempts."""

    process: subprocess.Popen[str]

    def ask(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks the attempts has ended")
        return dict(json.loads(line))

    def run(self, order: dict[str, Any], kill_after: float | None = None) -> Attempt:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        number = self.ask()["process"]
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(number, 9)
        code = self.ask()["code"]
        return Attempt(code, Path(order["out"]).read_text(), Path(order["err"]).read_text())


@contextmanager
def zygotes(count: int = 2) -> Iterator[list[Zygote]]:
    """Each with another order of Python's sets, as every new process has."""
    with ExitStack() as held:
        started = []
        for number in range(count):
            environment = {
                **os.environ,
                "PYTHONHASHSEED": str(number + 1),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(one for one in sys.path if one),
            }
            process = held.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "crash.zygote"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            started.append(Zygote(process))
        for one in started:
            one.ask()
        yield started
        for one in started:
            assert one.process.stdin is not None
            one.process.stdin.close()


@dataclass
class Case:
    """A recipe, and what its run comes to when nothing happens."""

    folder: Path
    recipe: Path
    operations: list[str] = field(default_factory=list)
    disk_operations: list[str] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    seconds: float = 0.0
    code: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def keeps_nothing(self) -> bool:
        train = json.loads(self.recipe.read_text(encoding="utf-8"))["train"]
        return train["save_strategy"] == "no" and "save_minutes" not in train

    @property
    def is_training_logged(self) -> bool:
        log = self.run / "log.jsonl"
        return log.exists() and bool(log.read_text(encoding="utf-8"))

    def order(self, **more: Any) -> dict[str, Any]:
        return {
            "arguments": ["train", str(self.recipe)],
            "environment": {"QLORA_KIT_CACHE": str(self.cache)},
            "folder": str(self.folder),
            "out": str(self.folder / "out"),
            "err": str(self.folder / "err"),
            **more,
        }

    def watch(self, **more: Any) -> dict[str, Any]:
        return {"watch": {"folders": [str(self.run), str(self.cache)], **more}}

    def clear(self, cold: bool) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if cold:
            shutil.rmtree(self.cache, ignore_errors=True)


def prepare_case(folder: Path, model: Path, seed: int, zygote: Zygote, **sections: Any) -> Case:
    """Two runs that nothing happens to, which count the operations."""
    case = Case(folder, write_case(folder, model, seed, **sections))
    told = folder / "told"
    start = time.monotonic()
    done = zygote.run(case.order(**case.watch(told=str(told))))
    case.seconds = time.monotonic() - start
    case.code = done.code
    if not (case.run / "summary.json").exists():
        raise RuntimeError(f"recipe {seed} does not run to its end:\n{done.out}{done.err}")
    case.operations = [json.loads(line) for line in told.read_text().splitlines()]
    case.expected, case.checkpoints = outcome_of(case.run), checkpoints_in(case.run)
    case.clear(cold=False)
    disk = {"at": 0, "fault": "none", "told": str(told)}
    zygote.run(case.order(disk=disk))
    case.disk_operations = json.loads(told.read_text())
    for fault in differences(case.expected, outcome_of(case.run)):
        raise RuntimeError(f"recipe {seed}: two runs that nothing happened to differ in {fault}")
    return case


def phase_of(operation: str) -> str:
    """Of a file operation, which part of a run it belongs to."""
    for phase, pattern in PHASES.items():
        if re.search(pattern, operation):
            return phase
    return "other"


PHASES = {
    "data cache": r"/cache/",
    "save": r"\.draft(/|$| )|checkpoint-\d+$|^(write|sync|rename to) .*",
    "rotation": r"\.(removed|replaced)|^remove",
    "begin run": r"recipe\.yaml|environment\.json|run/data$|\.lock|run$",
    "ledger": r"ledger",
    "log": r"log\.jsonl",
    "evaluation": r"evaluation\.json",
    "summary": r"summary\.json",
}


def name_of(case: Case, blow: Blow) -> str:
    """For the count of kills by phase; `adapter` and `merge` are folders that appear whole."""
    if blow.where == "clock":
        return "by the clock"
    listed = case.operations if blow.where == "files" else case.disk_operations
    operation = listed[min(blow.at, len(listed)) - 1]
    for word in ("adapter", "merged", "last-good"):
        if f"/.{word}." in operation or f"run/{word}" in operation:
            return {"merged": "merge"}.get(word, word)
    return phase_of(operation)


def draw_blows(random: Random, case: Case) -> list[Blow]:
    """One to three, each at some place of what is left of the run."""
    return [_draw_blow(random, case) for _ in range(random.choice([1, 1, 1, 2, 2, 3]))]


def _draw_blow(random: Random, case: Case) -> Blow:
    kind = random.choices(["kill", "gentle", "disk", "deep"], [50, 14, 16, 20])[0]
    at = random.randint(1, len(case.operations))
    if kind == "kill":
        fault = random.choice(FAULTS)
        if fault == "kill by the clock":
            return Blow("clock", 0, "kill", random.uniform(0.05, 1.0) * case.seconds)
        delay = random.choice([0.001, 0.01, 0.1, 0.3]) if fault == "kill later" else 0.0
        return Blow("files", at, "kill", delay)
    if kind == "gentle":
        return Blow("files", at, random.choice(GENTLE), 0.05)
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


def try_it(case: Case, blows: list[Blow], cold: bool, forks: list[Zygote]) -> list[str]:
    """What is wrong after the blows and the attempts that follow; empty where nothing is."""
    case.clear(cold)
    wrong: list[str] = []
    was_silent = any(blow.fault == SILENT for blow in blows)
    for number, blow in enumerate(blows):
        step, is_begun = newest_whole(case.run).step, (case.run / "recipe.yaml").exists()
        done = strike(case, blow, forks[number % len(forks)])
        wrong += faults_in(done, blow, case)
        wrong += restarted(done, step, is_begun)
        if newest_whole(case.run).step < step and not was_silent:
            wrong.append(f"checkpoint-{step} is gone, or damaged, after {blow}")
        if (case.run / "summary.json").exists():
            break
    step, is_begun = newest_whole(case.run).step, (case.run / "recipe.yaml").exists()
    if not (case.run / "summary.json").exists():
        done = forks[0].run(case.order(**case.watch()))
        if done.code != case.code:
            return [*wrong, f"it does not go on ({done.code}): {done.out[-600:]}{done.err[-1500:]}"]
        wrong += restarted(done, step, is_begun)
    again = forks[0].run(case.order(**case.watch()))
    if "is finished" not in again.out or again.code != case.code:
        wrong.append(f"it does not know that it is finished: {again.out[-500:]}{again.err[-500:]}")
    return wrong + differences(case.expected, outcome_of(case.run))


def restarted(done: Attempt, step: int, is_begun: bool) -> list[str]:
    """Where there was a checkpoint, it must be said that training goes on from it."""
    if "schedule " not in done.out:  # it did not come as far
        return []
    if step and f"checkpoint-{step} is whole; training goes on" not in done.out:
        return [f"checkpoint-{step} was there, and is not gone on from: {done.out[:600]}"]
    if is_begun and "holds a run that did not end" not in done.out:
        return [f"the run that was begun is not spoken of: {done.out[:600]}"]
    return []


def faults_in(done: Attempt, blow: Blow, case: Case) -> list[str]:
    """Whether an attempt ended as such a blow must end it."""
    wrong = []
    if "Traceback" in done.err or "Exception ignored" in done.err:
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
    if done.code in (130, 143) and case.is_training_logged and not case.keeps_nothing and not said:
        wrong.append(f"stopped, and no checkpoint: {done.out[-400:]}")
    if said and not (case.run / said[1]).is_dir():
        wrong.append(f"{said[1]} is told of, and not there")
    return wrong


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def shown(self) -> str:
        lines = [f"{sum(self.kills.values())} blows"]
        for title, counter in (("by phase", self.kills), ("by kind", self.faults)):
            listed = ", ".join(f"{name} {count}" for name, count in counter.most_common())
            lines.append(f"{title:9} {listed}")
        lines += [f"{len(self.failures)} failures", *self.failures]
        return "\n".join(lines)


def harness(folder: Path, trials: range, seed: int, only: int | None = None) -> Tally:
    """Trials by number; every few of them share a recipe."""
    tally = Tally()
    model = folder / "model"
    if not model.exists():
        build_llama(model)
    with zygotes() as forks:
        case = None
        for number in trials if only is None else [only]:
            group, place = divmod(number, TRIALS_PER_RECIPE)
            recipe_seed = seed * _RECIPE_SEEDS + group
            if case is None or place == 0:
                case = prepare_case(folder / f"case-{recipe_seed}", model, recipe_seed, forks[-1])
                print(f"recipe {recipe_seed}: {described(case)}", flush=True)
            random = Random(f"{seed} {number}")
            blows, cold = draw_blows(random, case), random.random() < 0.3
            wrong = try_it(case, blows, cold, forks)
            for blow in blows:
                tally.kills[name_of(case, blow)] += 1
                tally.faults[blow.fault] += 1
            _tell(number, seed, case, blows, cold, wrong, tally)
            if place == TRIALS_PER_RECIPE - 1 and not wrong:
                shutil.rmtree(case.folder, ignore_errors=True)
    return tally


def _tell(
    number: int,
    seed: int,
    case: Case,
    blows: list[Blow],
    cold: bool,
    wrong: list[str],
    tally: Tally,
) -> None:
    places = ", ".join(f"{one.fault} at {one.at} ({name_of(case, one)})" for one in blows)
    print(
        f"  {number} {'cold ' if cold else ''}{places}: {'FAILED' if wrong else 'ok'}", flush=True
    )
    if wrong:
        again = f"make crash-test SEED={seed} ONLY={number}"
        told = "\n    ".join([f"{case.recipe}: {[asdict(one) for one in blows]}", *wrong])
        tally.failures.append(f"  trial {number} ({again})\n    {told}")
        print(f"    {told}", flush=True)


def described(case: Case) -> str:
    values = json.loads(case.recipe.read_text(encoding="utf-8"))
    train, data = values["train"], values["data"]
    words = [train["optim"], f"save {train['save_strategy']}"]
    words += [name for name in ("save_minutes", "keep_best", "eval_strategy") if train.get(name)]
    words += [f"limit {train.get('save_total_limit', '-')}"]
    words += [name for name in ("packing", "streaming", "held_out", "mix") if data.get(name)]
    words += ["merge"] * values["export"]["merge"]
    words += [f"{case.seconds:.1f} s", f"{len(case.operations)} file operations"]
    return ", ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, help="one trial, by its number")
    parser.add_argument("--folder", type=Path, required=True, help="scratch; failures stay there")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time()) % 100_000
    print(f"seed {seed}", flush=True)
    trials = range(options.first, options.first + options.trials)
    tally = harness(options.folder, trials, seed, options.only)
    print(f"seed {seed}: {tally.shown()}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
