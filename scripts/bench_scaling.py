"""How time and memory grow with length, layers, width, rank, vocabulary, batch and rows.

python scripts/bench_scaling.py --json found.json --plot found.png
python scripts/bench_scaling.py --only length --rounds 1
python scripts/bench_scaling.py --read found.json --extrapolate

One thing at a time is varied on a model of random weights of SmolLM2-135M's shape, with four layers
and a vocabulary of 8,192, trained through `run_recipe`, in a process of its own for each shape. CPU
seconds of an update are then fitted by least squares, without negative terms, to what there is to
compute (see `Terms`), the memory of the process to what there is to hold (see `Holds`), and each
shape is held against a fit that was made without it. Memory is also told by `qlora-kit plan`. The
exit code is 1 where a fit is off by more than 25 % (time) or 10 % (memory).

`--extrapolate` tells what the fits say of 8B and 70B, and what `plan` says that they take of GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_plan import prediction, prepared
from plainly import Parser, at_least, existing_file, output_file, plainly, plot_file
from plan_bench.cases import Case
from scaling_bench.fits import tell_fit, tell_memory_fit
from scaling_bench.large import extrapolated, memory_extrapolated
from scaling_bench.shapes import BASE, ROW_COUNTS, SWEEPS, quantity_of, rows_of, value_of

from qlora_kit.__main__ import begin

UPDATES = 3
_MIB = 2**20
_ROWS = 64


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*SWEEPS, "rows"], help="unset: all of them")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--plot", type=plot_file, help="draw them here")
    parser.add_argument("--extrapolate", action="store_true", help="to 8B and 70B, also on GPUs")
    parser.add_argument(
        "--read",
        type=existing_file,
        help="tell what --json wrote before, and measure nothing",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.child)
    found = json.loads(arguments.read.read_text()) if arguments.read else all_measured(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(tables(found))
    off = tell_fit(found["shapes"]) + tell_memory_fit(found["shapes"])
    if arguments.extrapolate:
        print(extrapolated(found["shapes"]))
        print(memory_extrapolated(found["shapes"]))
    if arguments.plot:
        plot(found["shapes"], arguments.plot)
    return 1 if off else 0


def all_measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every shape in turns, so that the machine's mood is shared out."""
    chosen = arguments.only or [*SWEEPS, "rows"]
    shapes: dict[str, dict[str, Any]] = {}
    for number in range(arguments.rounds):
        for sweep in (name for name in chosen if name != "rows"):
            for one in SWEEPS[sweep]:
                key = json.dumps(asdict(one), sort_keys=True)
                row = shapes.setdefault(
                    key, {"case": asdict(one), "sweeps": [], "cpu_seconds": [], "process": []}
                )
                if sweep not in row["sweeps"]:
                    row["sweeps"].append(sweep)
                if len(row["cpu_seconds"]) > number:
                    continue  # of another sweep in this round
                real, predicted = run(one, _ROWS // 8, arguments.threads, "tensors" not in row)
                row["cpu_seconds"].append(real["cpu_seconds"])
                row["process"].append(real["process"])
                if predicted is not None:
                    row["tensors"], row["predicted"] = predicted["tensors"], predicted["process"]
                told = f"{sweep} {one.tokens} x {one.batch}, {one.layers} layers of {one.hidden}"
                print(f"{told}, r {one.rank}: {real['cpu_seconds']:.2f} s", flush=True)
    rows = []
    if "rows" in chosen:
        for count in ROW_COUNTS:
            real, _ = run(replace(BASE, tokens=128), count, arguments.threads, False)
            rows.append({"rows": count, **real})
            print(f"{count} rows: {real['start_cpu_seconds']:.1f} s to the start", flush=True)
    return {"shapes": list(shapes.values()), "rows": rows}


def run(
    one: Case, num_rows: int, threads: int, predicts: bool
) -> tuple[dict[str, float], dict[str, int] | None]:
    """What was measured of it, and what `plan` says of it."""
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
        folder = Path(scratch)
        recipe = prepared(one, folder)
        allow_length(folder / "model", one.tokens)
        write_rows(folder / "rows.jsonl", one, num_rows)
        values = json.loads(recipe.read_text())
        values["train"]["max_steps"] = UPDATES
        recipe.write_text(json.dumps(values))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--child", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{one} failed:\n{done.stderr[-3000:]}")
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured, prediction(recipe, threads) if predicts else None


def allow_length(model: Path, num_tokens: int) -> None:
    path = model / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "max_position_embeddings": max(num_tokens, 4096)}))


def write_rows(path: Path, one: Case, count: int) -> None:
    """Half of each is supervised; each is another, or it would be a duplicate."""
    lines = []
    for number in range(max(count, UPDATES * one.batch)):
        prompt = f"{number:06}".ljust(one.tokens // 2, "?")
        lines.append(json.dumps({"prompt": prompt, "completion": "a" * (one.tokens - len(prompt))}))
    path.write_text("\n".join(lines) + "\n")


def measure(recipe: Path) -> int:
    """In the child: CPU seconds of each update, of which the first begins the optimizer's state."""
    from qlora_kit.environment import settle_upstream

    settle_upstream()
    from contextlib import nullcontext

    from qlora_kit.recipe import load_recipe
    from qlora_kit.report.reporter import Progress, Reporter
    from qlora_kit.run import run_recipe

    ends: list[float] = []

    class Clock(Progress):
        def update(self, advance: int = 1, **fields: str) -> None:
            ends.append(time.process_time())

    class Listening(Reporter):
        def progress(self, name: str, total: int) -> Any:
            if name == "training":
                ends.append(time.process_time())
            return nullcontext(Clock() if name == "training" else Progress())

    result = run_recipe(load_recipe(recipe), Listening())
    assert result is not None
    memory = json.loads(result.run.summary.read_text())["memory"]
    spans = [end - start for start, end in pairwise(ends[1:])]
    print(
        json.dumps(
            {
                "cpu_seconds": statistics.median(spans),
                "start_cpu_seconds": ends[0],
                "process": memory["host_peak_bytes"]["training"],
            }
        )
    )
    return 0


def tables(found: dict[str, Any]) -> str:
    lines = []
    for sweep in SWEEPS:
        rows = rows_of(sweep, found["shapes"])
        if not rows:
            continue
        lines += ["", f"{sweep:12} CPU s/update  tokens/s   tensors MiB   process MiB"]
        for row in rows:
            one = row["case"]
            seconds = min(row["cpu_seconds"])
            rate = one["tokens"] * one["batch"] / seconds
            lines.append(
                f"{value_of(sweep, one):12} {seconds:12.2f} {rate:9.0f}"
                f" {row['tensors'] / _MIB:13,.0f} {max(row['process']) / _MIB:13,.0f}"
            )
    if found["rows"]:
        lines += ["", "rows         CPU s to the start  process MiB"]
        lines += [
            f"{one['rows']:<12,} {one['start_cpu_seconds']:18.1f} {one['process'] / _MIB:12,.0f}"
            for one in found["rows"]
        ]
    return "\n".join(lines)


def plot(shapes: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = [name for name in SWEEPS if name != "recompute"]
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 6))
    for column, sweep in enumerate(sweeps):
        rows = rows_of(sweep, shapes)
        x = [quantity_of(sweep, one["case"]) for one in rows]
        seconds = [min(one["cpu_seconds"]) for one in rows]
        axes[0][column].loglog(x, seconds, "o-", base=2)
        axes[1][column].loglog(x, [one["tensors"] / _MIB for one in rows], "o-", base=2)
        axes[0][column].set_title(sweep)
        axes[1][column].set_xlabel(sweep)
    axes[0][0].set_ylabel("CPU seconds an update")
    axes[1][0].set_ylabel("tensors at the peak, MiB")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    begin()
    sys.exit(plainly(main))
