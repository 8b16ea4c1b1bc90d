"""Training speed and memory beside plain transformers + peft and TRL, on the same rows.

python scripts/bench_train.py --rows rows.jsonl
python scripts/bench_train.py --rows rows.jsonl --recompute all --sides kit plain trl --trl FOLDER

Every side trains the same base (NF4, double quantization), adapter (the same first values, r = 16
on all linear layers), rows in the same order, tokens, batch, optimizer (AdamW in float32) and
precision, each in a process of its own, in turns. Printed are supervised and real tokens per
second from the second update on, the peak memory of the process and its children, the seconds to
the first update, and the ratios of each round against the kit, with their spread. The losses of all
sides have to be the same up to rounding, or the comparison is void and the exit code 1.

Before and after each run this process multiplies matrices of the model's shape: where that rate
differs much, neighbours were at work. By it the share of the limit is told: the products of the
forward pass and of the inputs' gradients, over real tokens, at that rate, over the time that was
taken.

`--trl FOLDER` names a folder with TRL (`pip install --no-deps --target FOLDER trl`), which the
kit itself does not need. Sides of other tools run in environments of their own and are not here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from train_bench.sides import SIDES, run_side
from train_bench.table import told
from train_bench.watch import Outcome, run
from train_bench.work import prepared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2-135m-instruct")
    parser.add_argument("--rows", help="rows as a recipe's source; unset: the demo's commands")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recompute", choices=("auto", "none", "all"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["kit", "plain"])
    parser.add_argument("--trl", type=Path, help="folder with TRL")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return run_side(arguments.side, arguments.folder)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as scratch:
        folder = Path(scratch)
        work, recipe = prepared(arguments, folder)
        outcomes: list[list[Outcome]] = []
        for number in range(arguments.rounds):
            order = arguments.sides[number % 2 :: 1] if number % 2 == 0 else arguments.sides[::-1]
            outcomes.append([run(side, folder, arguments) for side in order])
    return told(outcomes, work, recipe, arguments)


if __name__ == "__main__":
    sys.exit(main())
