"""What a checkpoint costs, beside writing its bytes to the disk.

python scripts/bench_checkpoint.py
python scripts/bench_checkpoint.py --repeats 30 train.optim=adamw_torch
python scripts/bench_checkpoint.py --folder /mnt/disk --json figures.json

The recipe's model is trained by one update; then, in turns and in one process, a checkpoint is
saved as training saves it, and the same bytes are written to plain files, each with fsync. `save`
is how long training waits, `whole` how long until the checkpoint is whole on the disk (written,
flushed, hashed, renamed), `cleared` until an older one is gone as well. Printed are the times and
the ratios of each pair, as median and range; the limit is for the medians of save / write and
whole / write.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from plainly import Parser, at_least, output_file, plainly

from qlora_kit.checkpoint.checkpoints import find_checkpoints, rotate
from qlora_kit.environment import settle_upstream
from qlora_kit.recipe import load_recipe
from qlora_kit.run import run_recipe
from qlora_kit.train.saving import Saver

LIMIT = 1.5
STAGES = ("save", "whole", "cleared")
LIMITED = ("save", "whole")
ROTATE = "qlora_kit.train.saving.rotate"
WARM_UPS = 3
ONE_UPDATE = (
    "train.max_steps=1",
    "train.per_device_train_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.save_total_limit=2",
    "train.eval_strategy='no'",
    "data.eval=[]",
    "evaluate.perplexity=false",
    "evaluate.generate=null",
    "export.merge=false",
)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--folder", type=Path, default=Path(), help="measure on this disk")
    parser.add_argument("--repeats", type=at_least(1), default=20)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    settle_upstream()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as scratch:
        figures = measure(arguments, Path(scratch))
    print(f"{figures['files']} files, {figures['bytes'] / 1e6:.1f} MB, {arguments.repeats} pairs")
    for name in ("write", *STAGES):
        milliseconds = [1000 * seconds for seconds in figures[f"{name}_seconds"]]
        print(f"{name:<16}{spread(milliseconds, '.1f')} ms")
    for name in STAGES:
        limit = f", limit {LIMIT}" if name in LIMITED else ""
        print(f"{name + ' / write':<16}{spread(figures[f'{name}_ratios'], '.2f')}{limit}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    medians = [statistics.median(figures[f"{name}_ratios"]) for name in LIMITED]
    return 0 if max(medians) <= LIMIT else 1


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Train by one update, and save that again and again under later numbers."""
    run_folder = scratch / "run"
    recipe = load_recipe(
        arguments.recipe, [*ONE_UPDATE, *arguments.overrides, f"run_dir={run_folder}"]
    )
    times: list[dict[str, float]] = []
    whole_at = 0.0
    contents: dict[str, bytes] = {}
    save = Saver.save

    def rotate_and_tell(*arguments: Any) -> None:
        nonlocal whole_at
        whole_at = time.perf_counter()
        rotate(*arguments)

    def save_repeatedly(saver: Saver) -> None:
        assert saver.trainer is not None
        for _ in range(WARM_UPS + arguments.repeats):
            started = time.perf_counter()
            save(saver)
            saved = time.perf_counter() - started
            saver.settle()
            cleared = time.perf_counter() - started
            if not contents:
                (newest, *_) = find_checkpoints(run_folder)
                contents.update((path.name, path.read_bytes()) for path in newest.iterdir())
            plain = write_plainly(contents, scratch / "plain")
            whole = whole_at - started
            times.append({"write": plain, "save": saved, "whole": whole, "cleared": cleared})
            saver.trainer.progress.update += 1

    with patch.object(Saver, "save", save_repeatedly), patch(ROTATE, rotate_and_tell):
        run_recipe(recipe)
    kept = times[WARM_UPS:]
    return {
        "files": len(contents),
        "bytes": sum(map(len, contents.values())),
        **{f"{name}_seconds": [one[name] for one in kept] for name in ("write", *STAGES)},
        **{f"{name}_ratios": [one[name] / one["write"] for one in kept] for name in STAGES},
    }


def write_plainly(contents: dict[str, bytes], folder: Path) -> float:
    """Seconds."""
    folder.mkdir()
    started = time.perf_counter()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


def spread(values: list[float], form: str) -> str:
    quarters = statistics.quantiles(values, n=4)
    return (
        f"{statistics.median(values):{form}} (half of them {quarters[0]:{form}} to "
        f"{quarters[2]:{form}}, all {min(values):{form}} to {max(values):{form}})"
    )


if __name__ == "__main__":
    sys.exit(plainly(main))
