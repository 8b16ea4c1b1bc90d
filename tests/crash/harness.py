"""Kills `train` hundreds of times, and sees that no run is lost, wrong or silently begun again.

make crash-test N=200 SEED=1

Every trial begins a run of some recipe, lets something happen to it once or several times in a row,
and then lets the same command go on until it has ended by itself. What is then in the run's folder
must be what the run has left that nothing happened to. A trial is told by its seed and number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from conftest import build_llama

from crash.case import Blow, Case, prepare_case
from crash.forks import zygotes
from crash.trial import draw_blows, try_it

_RECIPE_SEEDS = 10_000
TRIALS_PER_RECIPE = 6


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def shown(self) -> str:
        lines = [f"{sum(self.kills.values())} blows that ended an attempt"]
        for title, counter in (("by phase", self.kills), ("by kind", self.faults)):
            listed = ", ".join(f"{name} {count}" for name, count in counter.most_common())
            lines.append(f"{title:9} {listed}")
        lines += [f"{len(self.failures)} failures", *self.failures]
        return "\n".join(lines)


def harness(folder: Path, trials: range, seed: int, only: int | None = None) -> Tally:
    """Trials by number; every few of them share a recipe."""
    tally = Tally()
    folder = folder / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    model = build_llama(folder / "model")
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
            verdict = try_it(case, blows, cold, forks)
            for blow, phase in verdict.landed:
                tally.kills[phase] += 1
                tally.faults[blow.fault] += 1
            _tell(number, seed, case, blows, cold, verdict.wrong, tally)
            if place == TRIALS_PER_RECIPE - 1 and not verdict.wrong:
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
    places = ", ".join(
        f"{one.fault} at {one.at or 'a moment'} ({one.where if one.at == 0 else case.phase(one)})"
        for one in blows
    )
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
    if aware := values.get("quantization_aware"):
        words += [f"{aware['method']} inside, {aware['train']}"]
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
