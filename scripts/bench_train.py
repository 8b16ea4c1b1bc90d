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
sides have to be the same up to rounding: the largest difference of each is told with its update,
and a side that differs is named, is not compared, and makes the exit code 1. So does a side that
fails or cannot do this work: it is left out from there on, with the last lines that it wrote; the
others go on.

Losses over many updates are held against plain transformers + peft by

python scripts/bench_train.py --rows rows.jsonl --updates 50 --rounds 1

AdamW takes no notice of a gradient that is wrong by a constant factor. `--optimizer sgd` does, with
a learning rate to match (`--learning-rate 0.1`).

Before and after each run this process multiplies matrices of the model's shape: where that rate
differs much, neighbours were at work, and the last line, `trust`, says so. By it the share of the
limit is told: the products of the forward pass and of the inputs' gradients, over real tokens, at
that rate, over the time that was taken.

`--recompute auto` leaves each side its own default, and runs plain both without recomputing and
with all of it; the column `recomputes` says what was done.

`--trl FOLDER` names a folder with TRL (`pip install --no-deps --target FOLDER trl`), which the
kit itself does not need. The other tools want environments of their own, named by their Python.

On a GPU (`--device cuda`, the default where there is one) time is taken when its queue is empty,
and what torch's allocator gave out and reserved at most stands beside the host's memory. Unsloth
needs one:

python scripts/bench_train.py --model 8B --rows rows.jsonl --max-length 2048 --precision bf16 \\
    --sides kit plain unsloth --unsloth unsloth/bin/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from plainly import Fault, Parser, output_file, plainly, plot_file
from train_bench.registry import SIDES, turns
from train_bench.sides import torchtune
from train_bench.table import told
from train_bench.watch import Failure, Outcome, environment, interpreter, run
from train_bench.work import RATE, Work, prepared


def main() -> int:
    arguments = parsed()
    check_options(arguments)
    failures = lacking(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        folder = Path(scratch)
        sides = left_of(arguments.sides, failures)
        work, recipe = prepared(arguments, folder)
        failures += unable(sides, work)
        left_of(sides, failures)
        outcomes = all_rounds(arguments, folder, failures)
        return told(outcomes, failures, work, recipe, arguments)


def all_rounds(
    arguments: argparse.Namespace, folder: Path, failures: list[Failure]
) -> list[list[Outcome]]:
    """What the sides came to, round by round, there and back. A line that fails is added to
    `failures` and not run again.
    """
    order = turns(arguments.sides, arguments.recompute)
    outcomes = []
    for number in range(arguments.rounds):
        row = []
        for turn in order if number % 2 == 0 else order[::-1]:
            if any(one.hits(turn) for one in failures):
                continue
            ended = run(turn, folder, arguments)
            if isinstance(ended, Outcome):
                row.append(ended)
            else:
                failures.append(named(ended))
        outcomes.append(row)
    return outcomes


def named(failure: Failure) -> Failure:
    """Say at once what has failed, before others take their time."""
    print(failure, file=sys.stderr, flush=True)
    return failure


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options: those given, or the command line's. Raises Fault where a device is not there."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2-135m-instruct")
    parser.add_argument("--rows", help="rows as a recipe's source; unset: the demo's commands")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows that go through at a time")
    parser.add_argument("--accumulation", type=int, default=1, help="batches of an update")
    parser.add_argument("--updates", type=int, default=8, help="two at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recompute", choices=("auto", "none", "all"), default="auto")
    parser.add_argument("--optimizer", choices=("adamw_torch", "sgd"), default="adamw_torch")
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["kit", "plain"])
    parser.add_argument("--trl", type=Path, metavar="FOLDER", help="folder with TRL")
    for side, known in SIDES.items():
        if known.has_interpreter:
            parser.add_argument(
                f"--{side}", type=Path, metavar="PYTHON", help=f"of an environment with {side}"
            )
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--plot", type=plot_file, help="draw speed against memory here")
    arguments = parser.parse_args(given)
    for name, least in {
        "batch": 1,
        "accumulation": 1,
        "updates": 2,
        "rounds": 1,
        "threads": 1,
    }.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    arguments.device = device_of(arguments.device)
    return arguments


def check_options(arguments: argparse.Namespace) -> None:
    """Before anything is loaded: each side is said where it is. Raises Fault."""
    for side in arguments.sides:
        known = SIDES[side]
        if known.gpu_only and arguments.device == "cpu":
            raise Fault(f"{side} needs a GPU; this is a run on the CPU. Leave it out of --sides.")
        if not known.needs:
            continue
        where = getattr(arguments, known.needs)
        if where is None:
            raise Fault(f"{side} needs --{known.option}: where it is installed.")
        if not Path(where).exists():
            raise Fault(f"--{known.option} {where} is not there; install {known.package} first.")


def device_of(asked: str) -> str:
    """`cpu` or `cuda`; on the CPU nobody sees a GPU from here on. Raises Fault where none is."""
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise Fault(
            "--device cuda: torch sees no GPU here. Leave the option out to run on the CPU."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return "cpu"


def lacking(arguments: argparse.Namespace) -> list[Failure]:
    """Sides whose environment does not have their tool. Raises Fault where it is none."""
    return [
        named(
            Failure(side, f"--{SIDES[side].option} {getattr(arguments, SIDES[side].needs)} {why}")
        )
        for side in arguments.sides
        if SIDES[side].needs and (why := lack(side, arguments)) is not None
    ]


def lack(side: str, arguments: argparse.Namespace) -> str | None:
    """What a side's interpreter has no version of; None where it has one. Raises Fault where it is
    no interpreter.
    """
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
    return f"has no {known.package}; install it there." if answer.returncode != 0 else None


def unable(sides: list[str], work: Work) -> list[Failure]:
    """Sides that cannot train this base."""
    if "torchtune" not in sides:
        return []
    why = torchtune.objection(Path(work.model))
    return [named(Failure("torchtune", f"{work.model}: {why}."))] if why is not None else []


def left_of(sides: list[str], failures: list[Failure]) -> list[str]:
    """Sides that have not failed yet. Raises Fault where there is none."""
    failed = {one.label for one in failures}
    left = [side for side in sides if side not in failed]
    if not left:
        raise Fault("No side is left to run.")
    return left


if __name__ == "__main__":
    sys.exit(plainly(main))
