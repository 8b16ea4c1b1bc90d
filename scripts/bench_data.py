"""Rows and tokens per second from a file to packed sequences, against the tokenizer alone.

python scripts/bench_data.py
python scripts/bench_data.py --rows 1000 10000 100000 --repeats 3 --json figures.json

Each size runs in a process of its own, which makes the rows (conversations of the demo task, two
to six turns), renders them once through the whole of data preparation with an empty cache, has
the tokenizer alone encode the very texts that were rendered, in batches of the same size and on
all cores, and does so again in turns. Printed are the ratio of the two (1.00: data preparation
costs nothing beside the tokenizer), the time to packed sequences from the cache, and the peak of
the process's memory above what its imports need.

The tokenizer alone is measured twice: as it is called (`tokenizer(texts)`), and in brackets by its
quickest way, which gives ids without their places in the text (`encode_batch_fast`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, output_file, plainly

BATCH_ROWS = 512
MAX_LENGTH = 1024


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--tokenizer", default="demo/smollm2-135m-instruct")
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--one", type=at_least(1), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.repeats, arguments.tokenizer)))
        return 0
    figures = []
    print(
        "    rows    rows/s   tokens/s  of the tokenizer's rate (at its quickest)  cached  memory"
    )
    for rows in arguments.rows:
        figures.append(in_a_process(rows, arguments.repeats, arguments.tokenizer))
        print(line(figures[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def in_a_process(rows: int, repeats: int, tokenizer: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(rows), "--repeats", str(repeats)]
    command += ["--tokenizer", tokenizer]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def line(figures: dict[str, Any]) -> str:
    return (
        f"{figures['rows']:>8,}  {figures['rows_per_second']:>8,.0f}  "
        f"{figures['tokens_per_second']:>9,.0f}  {spread(figures['ratios'])} "
        f"({spread(figures['quickest_ratios'])})  {figures['cached_seconds']:>6.2f} s  "
        f"{figures['peak_mib']:>3,.0f} MiB"
    )


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}, {min(ratios):.2f}-{max(ratios):.2f}"


def measure(rows: int, repeats: int, tokenizer_name: str) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from qlora_kit.data.pack import pack
    from qlora_kit.data.prepare import prepare_train
    from qlora_kit.model.source import resolve_source
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.recipe.data import DataSpec

    tokenizer = load_tokenizer(resolve_source(tokenizer_name).folder)
    stop_ids = frozenset(range(len(tokenizer)))
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        write_rows(path, rows)
        spec = DataSpec.model_validate(
            {"train": [{"path": str(path)}], "max_length": MAX_LENGTH, "duplicates": "keep"}
        )
        before = peak_mib()
        ours, alone, quickest = [], [], []
        texts: list[str] = []
        for repeat in range(repeats):
            os.environ["QLORA_KIT_CACHE"] = f"{scratch}/cache-{repeat}"
            start = time.perf_counter()
            part = prepare_train(spec, tokenizer, stop_ids)
            bins = pack(part.sequences.lengths, MAX_LENGTH)  # type: ignore[attr-defined]
            ours.append(time.perf_counter() - start)
            if repeat == 0:
                peak = peak_mib() - before
            texts = texts or [tokenizer.decode(list(one.input_ids)) for one in part.sequences]
            alone.append(seconds_of(tokenizer, texts))
            quickest.append(seconds_of(tokenizer.backend_tokenizer.encode_batch_fast, texts))
        start = time.perf_counter()
        part = prepare_train(spec, tokenizer, stop_ids)
        cached = time.perf_counter() - start
    tokens = part.ledger.rendered_tokens
    return {
        "rows": rows,
        "tokens": tokens,
        "rows_per_second": rows / statistics.median(ours),
        "tokens_per_second": tokens / statistics.median(ours),
        "tokenizer_tokens_per_second": tokens / statistics.median(alone),
        "ratios": [one / other for one, other in zip(alone, ours, strict=True)],
        "quickest_ratios": [one / other for one, other in zip(quickest, ours, strict=True)],
        "cached_seconds": cached,
        "packed_sequences": len(bins),
        "filled": tokens / len(bins) / MAX_LENGTH,
        "peak_mib": peak,
    }


def seconds_of(encode: Callable[..., Any], texts: list[str]) -> float:
    start = time.perf_counter()
    for first in range(0, len(texts), BATCH_ROWS):
        encode(texts[first : first + BATCH_ROWS], add_special_tokens=False)
    return time.perf_counter() - start


def write_rows(path: Path, count: int) -> None:
    """Conversations of one to three exchanges, put together from the demo task."""
    from qlora_kit.data.demo import demo_rows

    task = [row["messages"] for row in demo_rows("commands", "train")]
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [one for _ in range(chance.randint(1, 3)) for one in chance.choice(task)]
            talk = [one for one in turns if one["role"] != "system"]
            file.write(json.dumps({"messages": talk}) + "\n")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(plainly(main))
