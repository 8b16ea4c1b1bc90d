"""A recipe, what its run comes to when nothing happens to it, and the operations of that run."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash.forks import Zygote
from crash.outcome import checkpoints_in, differences, outcome_of
from crash.recipes import write_case


@dataclass(frozen=True)
class Blow:
    """What happens to one attempt: `fault`, at operation number `at` of those under `where`."""

    where: str
    """`files`: all of the run's and the cache's; `disk`: those of saving; `clock`: none."""
    at: int
    fault: str
    delay_seconds: float = 0.0


PHASES = {
    "loading": r"^read ",
    "data cache": r"/cache/",
    "adapter": r"run/\.?adapter",
    "merge": r"run/\.?merged",
    "rotation": r"\.(removed|replaced)|^remove",
    "save": r"\.draft(/|$| )|checkpoint-\d+$|^(write|sync|rename to) .*",
    "begin run": r"recipe\.yaml|environment\.json|run/data$|\.lock|run$",
    "ledger": r"ledger",
    "log": r"log\.jsonl",
    "evaluation": r"evaluation\.json",
    "summary": r"summary\.json",
}


def phase_of(operation: str) -> str:
    """Which part of a run a file operation belongs to."""
    found = (phase for phase, pattern in PHASES.items() if re.search(pattern, operation))
    return next(found, "other")


@dataclass
class Case:
    """A recipe, and what its run comes to when nothing happens."""

    folder: Path
    recipe: Path
    model: Path
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

    def places(self) -> dict[str, list[int]]:
        """The numbers of the operations of each phase."""
        by_phase: dict[str, list[int]] = {}
        for number, operation in enumerate(self.operations, start=1):
            by_phase.setdefault(phase_of(operation), []).append(number)
        return by_phase

    def phase(self, blow: Blow) -> str:
        """Where in an undisturbed run a blow would fall."""
        if blow.where == "clock":
            return "by the clock"
        listed = self.operations if blow.where == "files" else self.disk_operations
        return phase_of(listed[blow.at - 1]) if blow.at <= len(listed) else "other"

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
        folders = {"folders": [str(self.run), str(self.cache)], "read_folders": [str(self.model)]}
        return {"watch": {**folders, **more}}

    def clear(self, cold: bool) -> None:
        shutil.rmtree(self.run, ignore_errors=True)
        if cold:
            shutil.rmtree(self.cache, ignore_errors=True)


def prepare_case(folder: Path, model: Path, seed: int, zygote: Zygote, **sections: Any) -> Case:
    """Two runs that nothing happens to, which count the operations."""
    case = Case(folder, write_case(folder, model, seed, **sections), model)
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
