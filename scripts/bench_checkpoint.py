"""What a checkpoint costs beyond writing its bytes to the disk.

python scripts/bench_checkpoint.py
python scripts/bench_checkpoint.py --checkpoint runs/quickstart/checkpoint-71 --repeats 30
python scripts/bench_checkpoint.py --folder /mnt/disk --json figures.json

In turns, in one process: a checkpoint is published (written, flushed, hashed, renamed) and the
oldest of three rotated away; the same bytes are written to plain files, each with fsync, and
removed again. Printed are the times and the ratio of each pair, as median and range; the limit is
for publishing against writing.
Without --checkpoint the files are of the size and kind that the quickstart recipe's have: an
adapter of rank 16 on every linear layer of SmolLM2-135M, its 8-bit optimizer state, a tokenizer.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_kit.checkpoint.checkpoints import publish_checkpoint, rotate
from qlora_kit.checkpoint.manifest import MANIFEST_FILE
from qlora_kit.checkpoint.tensors import STRUCTURE, load_values, save_tensors, save_values

LIMIT = 1.5
WARM_UPS = 2
RANK, LAYERS, HIDDEN, KEYS, INNER = 16, 30, 576, 192, 1536
# (in, out) of q, k, v, o, gate, up and down
LINEAR = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]
LINEAR += [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
TOKENIZER_BYTES = 3_500_000
QMAPS = {"qmap1": torch.randn(256), "qmap2": torch.randn(256)}

Save = Callable[[Path], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="take the files of this one")
    parser.add_argument("--folder", type=Path, default=Path(), help="measure on this disk")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    files = read_files(arguments.checkpoint) if arguments.checkpoint else demo_files()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as scratch:
        figures = measure(files, Path(scratch), arguments.repeats)
    print(f"{figures['files']} files, {figures['bytes'] / 1e6:.1f} MB, {arguments.repeats} pairs")
    for name in ("write", "publish", "remove", "rotate"):
        milliseconds = [1000 * seconds for seconds in figures[f"{name}_seconds"]]
        print(f"{name:<18}{spread(milliseconds, '.1f')} ms")
    print(f"{'publish / write':<18}{spread(figures['ratios'], '.2f')}, limit {LIMIT}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if statistics.median(figures["ratios"]) <= LIMIT else 1


def spread(values: list[float], form: str) -> str:
    quarters = statistics.quantiles(values, n=4)
    return (
        f"{statistics.median(values):{form}} (half of them {quarters[0]:{form}} to "
        f"{quarters[2]:{form}}, all {min(values):{form}} to {max(values):{form}})"
    )


def measure(files: dict[str, Save], scratch: Path, repeats: int) -> dict[str, Any]:
    def write(draft: Path) -> Iterator[Path]:
        for name, save in files.items():
            save(draft / name)
            yield draft / name

    (scratch / "once").mkdir()
    contents = {path.name: path.read_bytes() for path in write(scratch / "once")}
    run_folder = scratch / "run"
    run_folder.mkdir()
    times: dict[str, list[float]] = {"write": [], "publish": [], "remove": [], "rotate": []}
    plain = scratch / "plain"
    for step in range(1, WARM_UPS + repeats + 1):
        folder = run_folder / f"checkpoint-{step}"
        works: list[tuple[str, Callable[[], object]]] = [
            ("write", partial(write_plainly, contents, plain)),
            ("publish", partial(publish_checkpoint, folder, write)),
        ]
        for name, work in works if step % 2 else reversed(works):
            times[name].append(seconds(work))
        times["remove"].append(seconds(partial(shutil.rmtree, plain)))
        times["rotate"].append(seconds(partial(rotate, run_folder, 2, None)))
    kept = {name: values[WARM_UPS:] for name, values in times.items()}
    return {
        "files": len(contents),
        "bytes": sum(map(len, contents.values())),
        **{f"{name}_seconds": values for name, values in kept.items()},
        "ratios": [
            ours / plainly for ours, plainly in zip(kept["publish"], kept["write"], strict=True)
        ],
    }


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_plainly(contents: dict[str, bytes], folder: Path) -> None:
    folder.mkdir()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def read_files(checkpoint: Path) -> dict[str, Save]:
    """Each file of a real checkpoint, to be written again by what wrote it."""
    paths = [path for path in checkpoint.iterdir() if path.name != MANIFEST_FILE]
    return {path.name: saver_of(path) for path in sorted(paths)}


def saver_of(path: Path) -> Save:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            is_nested = STRUCTURE in (file.metadata() or {})
        return saving_values(load_values(path)) if is_nested else saving_tensors(load_file(path))
    if path.suffix in (".pt", ".pth", ".bin"):
        return saving_objects(torch.load(path, weights_only=False))
    return saving_bytes(path.read_bytes())


def demo_files() -> dict[str, Save]:
    shapes = [
        shape
        for _ in range(LAYERS)
        for ins, outs in LINEAR
        for shape in [(RANK, ins), (outs, RANK)]
    ]
    adapter = {f"weight.{number}": torch.randn(*shape) for number, shape in enumerate(shapes)}
    state = {number: adam_state(shape) for number, shape in enumerate(shapes)}
    return {
        "adapter_model.safetensors": saving_tensors(adapter),
        "optimizer.safetensors": saving_values({"state": state}),
        "tokenizer.json": saving_bytes(os.urandom(TOKENIZER_BYTES)),
        "scheduler.pt": saving_objects({"last_epoch": 1}),
        "rng_state.pth": saving_objects({"cpu": torch.get_rng_state()}),
        "trainer_state.json": saving_bytes(os.urandom(20_000)),
        "adapter_config.json": saving_bytes(os.urandom(1_000)),
        "recipe.yaml": saving_bytes(os.urandom(3_000)),
    }


def adam_state(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Two bytes a parameter, and a scale for every 256, as bitsandbytes' 8-bit Adam has it."""
    num_scales = -(-shape[0] * shape[1] // 256)
    return {
        **QMAPS,
        "state1": torch.randint(256, shape, dtype=torch.uint8),
        "state2": torch.randint(256, shape, dtype=torch.uint8),
        "absmax1": torch.randn(num_scales),
        "absmax2": torch.randn(num_scales),
    }


def saving_tensors(tensors: dict[str, torch.Tensor]) -> Save:
    return lambda path: save_tensors(tensors, path)


def saving_values(values: Any) -> Save:
    return lambda path: save_values(values, path)


def saving_objects(value: Any) -> Save:
    return lambda path: torch.save(value, path)


def saving_bytes(content: bytes) -> Save:
    return lambda path: path.write_bytes(content) and None


if __name__ == "__main__":
    sys.exit(main())
