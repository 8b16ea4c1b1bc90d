"""The heap of `train`: as the C library has it, tidy, and tidy with large pages; time and memory.

python scripts/bench_heap.py --rows rows.jsonl
python scripts/bench_heap.py --rows rows.jsonl --recompute all --rounds 5 --json found.json

`train` and `plan` begin again with a tidy heap that asks for large pages (docs/memory.md, "Holes in
the heap"; docs/performance.md, "Large pages"). Here the same recipe is trained with each kind of
heap, in processes of their own, in turns; printed are the seconds of an update from the second on,
those to the end of the first, the peak of the process, and the ratios of each round against the
heap as it is, with their spread. Losses have to be the same bits. The system says whether pages are
large: where it always makes them so, or never, the last two are alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import bench_train
from plainly import Fault, Parser, at_least, output_file, plainly
from train_bench.registry import turns
from train_bench.table import spread
from train_bench.watch import Outcome, run
from train_bench.work import prepared

AS_IT_IS, TIDY, LARGE = "as it is", "tidy", "large pages"
_NO_SMALL_LISTS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
HEAPS = {
    AS_IT_IS: "glibc.malloc.tcache_count=7",  # what it is anyway: said, so that it is left so
    TIDY: f"{_NO_SMALL_LISTS}:glibc.malloc.hugetlb=0",
    LARGE: f"{_NO_SMALL_LISTS}:glibc.malloc.hugetlb=1",
}
"""What the environment says of each."""
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def main() -> int:
    """Train with each, and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="rows as a recipe's source; unset: the demo's commands")
    parser.add_argument("--batch", type=at_least(1), default=2, help="rows that go through at once")
    parser.add_argument("--updates", type=at_least(2), default=5)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--recompute", choices=("none", "all"), default="none")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    arguments = parser.parse_args()
    if platform.libc_ver()[0] != "glibc":
        raise Fault("these are settings of the GNU C library, which this system does not have.")
    same = {name: getattr(arguments, name) for name in ("batch", "updates", "rounds", "threads")}
    same |= {"recompute": arguments.recompute, "precision": arguments.precision}
    given = [part for name, value in same.items() for part in (f"--{name}", str(value))]
    given += ["--rows", arguments.rows] if arguments.rows else []
    of_training = bench_train.parsed(["--device", "cpu", "--sides", "kit", *given])
    with tempfile.TemporaryDirectory(prefix="bench-heap-") as scratch:
        folder = Path(scratch)
        prepared(of_training, folder)
        rounds = [one_round(of_training, folder, number) for number in range(arguments.rounds)]
    setting = _SETTING.read_text().strip() if _SETTING.exists() else "unknown"
    print(f"glibc {platform.libc_ver()[1]}; large pages of the system: {setting}")
    show(rounds)
    if arguments.json:
        values = [{heap: vars(one) for heap, one in row.items()} for row in rounds]
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return 0


def one_round(of_training: argparse.Namespace, folder: Path, number: int) -> dict[str, Outcome]:
    """A run with each heap, there and back."""
    (turn,) = turns(["kit"], of_training.recompute)
    order = list(HEAPS) if number % 2 == 0 else list(HEAPS)[::-1]
    found = {}
    for heap in order:
        os.environ["GLIBC_TUNABLES"] = HEAPS[heap]
        ended = run(turn, folder, of_training)
        if not isinstance(ended, Outcome):
            raise Fault(f"{heap}: {ended}")
        found[heap] = ended
    if any(one.losses != found[AS_IT_IS].losses for one in found.values()):
        raise Fault("the losses are not the same bits.")
    return found


def show(rounds: Sequence[dict[str, Outcome]]) -> None:
    """A line of each heap, and how even the machine was."""
    print("heap            s an update   first update s   peak MiB")
    for heap in HEAPS:
        runs = [row[heap] for row in rounds]
        print(
            f"{heap:15} {median(seconds_of(one) for one in runs):11.2f} "
            f"{median(one.ends[0] for one in runs):16.1f} "
            f"{median(one.peak_bytes for one in runs) / 2**20:10,.0f}"
        )
    for heap in (TIDY, LARGE):
        pairs = [(row[AS_IT_IS], row[heap]) for row in rounds]
        print(
            f"{heap} : {AS_IT_IS}  "
            f"speed {spread([seconds_of(one) / seconds_of(other) for one, other in pairs])}, "
            f"first update {spread([other.ends[0] / one.ends[0] for one, other in pairs])}, "
            f"peak {spread([other.peak_bytes / one.peak_bytes for one, other in pairs])}"
        )
    gauges = [
        rate
        for row in rounds
        for one in row.values()
        for rate in (one.gauge_before, one.gauge_after)
    ]
    print(f"trust: the gauge varied by {max(gauges) / min(gauges) - 1:.0%} between the runs")


def seconds_of(one: Outcome) -> float:
    """Of an update, from the second on."""
    return one.seconds / (len(one.ends) - 1)


if __name__ == "__main__":
    sys.exit(plainly(main))
