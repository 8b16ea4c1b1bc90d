"""Training speed and memory beside plain transformers + peft and other tools, on the same rows.

python scripts/bench_train.py --rows rows.jsonl
python scripts/bench_train.py --rows rows.jsonl --recompute all --sides kit plain trl --trl FOLDER
python scripts/bench_train.py --rows rows.jsonl --sides kit plain llama-factory axolotl \\
    --llama-factory lf/bin/python --axolotl axolotl/bin/python

Every side trains the same base (NF4, double quantization), adapter (the same first values, r = 16
on all linear layers), rows in the same order, tokens, batch, optimizer (AdamW in float32) and
precision, each in a process of its own, in turns. Printed are supervised and real tokens per
second from the second update on, the peak memory of the process and its children, the seconds to
the first update, and the ratios of each round against the kit, with their spread. The losses of all
sides have to be the same up to rounding: a side that differs is named, is not compared, and makes
the exit code 1.

Before and after each run this process multiplies matrices of the model's shape: where that rate
differs much, neighbours were at work. By it the share of the limit is told: the products of the
forward pass and of the inputs' gradients, over real tokens, at that rate, over the time that was
taken.

`--recompute auto` leaves each side its own default, and runs plain both without recomputing and
with all of it; the column `recomputes` says what was done.

`--trl FOLDER` names a folder with TRL (`pip install --no-deps --target FOLDER trl`), which the
kit itself does not need. The other tools want environments of their own, named by their Python.
Training is on the CPU on all sides, so that Unsloth, which needs a GPU, cannot be one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from plainly import Fault, Parser, plainly
from train_bench.registry import SIDES, turns
from train_bench.sides import torchtune
from train_bench.table import told
from train_bench.watch import Outcome, environment, interpreter, run
from train_bench.work import prepared


def main() -> int:
    arguments = parsed()
    check_sides(arguments)
    sides = arguments.sides
    order = turns(sides, arguments.recompute)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        folder = Path(scratch)
        work, recipe = prepared(arguments, folder)
        objection = torchtune.objection(Path(work.model)) if "torchtune" in sides else None
        if objection is not None:
            raise Fault(f"{work.model}: {objection}; leave torchtune out of --sides.")
        outcomes: list[list[Outcome]] = []
        for number in range(arguments.rounds):
            now = order if number % 2 == 0 else order[::-1]
            outcomes.append([run(turn, folder, arguments) for turn in now])
    return told(outcomes, work, recipe, arguments)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2-135m-instruct")
    parser.add_argument("--rows", help="rows as a recipe's source; unset: the demo's commands")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--updates", type=int, default=8, help="two at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recompute", choices=("auto", "none", "all"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["kit", "plain"])
    parser.add_argument("--trl", type=Path, metavar="FOLDER", help="folder with TRL")
    for side, known in SIDES.items():
        if known.has_interpreter:
            parser.add_argument(
                f"--{side}", type=Path, metavar="PYTHON", help=f"of an environment with {side}"
            )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    for name, least in {
        "batch": 1,
        "accumulation": 1,
        "updates": 2,
        "rounds": 1,
        "threads": 1,
    }.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    return arguments


def check_sides(arguments: argparse.Namespace) -> None:
    """Before anything is loaded: each side's environment has its tool. Raises Fault."""
    for side in arguments.sides:
        known = SIDES[side]
        if not known.needs:
            continue
        where = getattr(arguments, known.needs)
        if where is None:
            raise Fault(f"{side} needs --{known.option}: where it is installed.")
        if not Path(where).exists():
            raise Fault(f"--{known.option} {where} is not there; install {known.package} first.")
        check_package(side, arguments)


def check_package(side: str, arguments: argparse.Namespace) -> None:
    """Ask a side's interpreter for the tool's version. Raises Fault where it has none."""
    known = SIDES[side]
    where = interpreter(side, arguments)
    question = f"import importlib.metadata as m; print(m.version({known.package!r}))"
    try:
        answer = subprocess.run(
            [where, "-c", question],
            env=environment(side, arguments),
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise Fault(f"--{known.option} {where} is no Python that runs: {error}") from None
    if answer.returncode != 0:
        place = getattr(arguments, known.needs)
        raise Fault(f"--{known.option} {place} has no {known.package}; install it there.")


if __name__ == "__main__":
    sys.exit(plainly(main))
