"""Whether going on at update 10,000 reaches its first update as quickly as at update 10.

python scripts/bench_resume.py
python scripts/bench_resume.py --late 100000 --rows 50000 --repeats 9 --json figures.json
python scripts/bench_resume.py --streaming --rows 20500

A tiny random model is trained on generated rows to update 10 and stopped. Its checkpoint is copied
and said to be of update 10,000: number, schedule and all. Then `run_recipe`, as `qlora-kit train`
calls it, goes on with one and the other in turns, each to the end of its first update. A stream is
read for one pass without training, so that the checkpoint says where update 10,000 stands: with
20,500 rows, near the end of the second pass, which is as far as it can be from one. Printed are
the seconds from the call to that moment and the ratio of each pair (late : early).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, output_file, plainly

from qlora_kit.checkpoint.checkpoints import publish_checkpoint
from qlora_kit.checkpoint.draft import Draft
from qlora_kit.checkpoint.global_batch import PROGRESS_FILE
from qlora_kit.checkpoint.manifest import MANIFEST_FILE
from qlora_kit.checkpoint.run_directory import OPTIMIZER_FILE
from qlora_kit.checkpoint.tensors import load_values, value_parts
from qlora_kit.data.prepare import prepare_train
from qlora_kit.environment import settle_upstream
from qlora_kit.errors import RunStopped
from qlora_kit.model.source import resolve_source
from qlora_kit.recipe import Recipe, load_recipe
from qlora_kit.report.reporter import Progress, Reporter
from qlora_kit.run import run_recipe
from qlora_kit.train.snapshot import STREAM_FILE, read_place

PER_UPDATE = 4
WARM_UPS = 1


class StopAt(Progress):
    """Asks for the end, as a spot instance does, after some updates of this attempt."""

    def __init__(self, updates: int):
        self.left = updates
        self.reached = 0.0

    def update(self, advance: int = 1, **fields: str) -> None:
        self.left -= advance
        if self.left == 0:
            self.reached = time.perf_counter()
            os.kill(os.getpid(), signal.SIGTERM)


class Listening(Reporter):
    """Says nothing, and stops training."""

    def __init__(self, updates: int):
        self.training = StopAt(updates)

    @contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        yield self.training if name == "training" else Progress()


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/smollm2-135m-instruct", help="whose tokenizer")
    parser.add_argument("--early", type=at_least(1), default=10, metavar="UPDATE")
    parser.add_argument("--late", type=at_least(1), default=10_000, metavar="UPDATE")
    parser.add_argument("--rows", type=at_least(1), default=20_000)
    parser.add_argument("--streaming", action="store_true", help="rows are read while training")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="pairs")
    parser.add_argument("--json", type=output_file, help="write the figures here")
    arguments = parser.parse_args()
    settle_upstream()
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        figures = measure(Path(scratch), arguments)
    for side in ("early", "late"):
        seconds = figures[f"{side}_seconds"]
        print(f"update {figures[side]:>7,}: {spread(seconds)} s to the first update")
    print(f"late : early   {spread(figures['ratios'])} of {len(figures['ratios'])} pairs")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def measure(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    model = tiny_model(scratch / "model", arguments.model)
    os.environ["QLORA_KIT_CACHE"] = str(scratch / "cache")  # the user's own is left alone
    rows = scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(arguments.rows):
            file.write(json.dumps({"prompt": f"count to {number}", "completion": "done"}) + "\n")
    recipes = {
        name: recipe_in(scratch / name, model, rows, 2 * arguments.late, arguments.streaming)
        for name in ("early", "late")
    }
    go_on(recipes["early"], arguments.early)
    folders = {name: Path(recipe.run_dir) for name, recipe in recipes.items()}
    shutil.copytree(folders["early"], folders["late"])
    checkpoint = folders["late"] / f"checkpoint-{arguments.early}"
    place = place_at(recipes["late"], checkpoint, arguments.late) if arguments.streaming else None
    say_it_is_of(checkpoint, arguments.early, arguments.late, place)
    seconds: dict[str, list[float]] = {"early": [], "late": []}
    for pair in range(arguments.repeats + WARM_UPS):
        for name in ("early", "late") if pair % 2 else ("late", "early"):
            start = time.perf_counter()
            reached = go_on(recipes[name], 1)
            if pair >= WARM_UPS:
                seconds[name].append(reached - start)
            update = getattr(arguments, name)
            shutil.rmtree(folders[name] / f"checkpoint-{update + 1}")
            assert (folders[name] / f"checkpoint-{update}").is_dir()
    return {
        "early": arguments.early,
        "late": arguments.late,
        "rows": arguments.rows,
        "early_seconds": seconds["early"],
        "late_seconds": seconds["late"],
        "ratios": [
            late / early for early, late in zip(seconds["early"], seconds["late"], strict=True)
        ],
    }


def tiny_model(folder: Path, tokenizer_of: str) -> Path:
    """Random weights, with a real tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_source(tokenizer_of).folder)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder)
    return folder


def recipe_in(folder: Path, model: Path, rows: Path, num_updates: int, is_streamed: bool) -> Recipe:
    path = folder.with_suffix(".yaml")
    values = {
        "model": {"name_or_path": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 64, "streaming": is_streamed},
        "train": {
            "max_steps": num_updates,
            "per_device_train_batch_size": PER_UPDATE,
            "gradient_accumulation_steps": 1,
            "save_total_limit": None,
        },
        "evaluate": {"perplexity": False},
        "run_dir": str(folder),
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(path)


def go_on(recipe: Recipe, updates: int) -> float:
    """Train for some updates, then stop with a checkpoint; when the last of them was made."""
    reporter = Listening(updates)
    try:
        run_recipe(recipe, reporter)
    except RunStopped:
        return reporter.training.reached
    raise AssertionError("the run was to be stopped")


def place_at(recipe: Recipe, checkpoint: Path, update: int) -> dict[str, Any]:
    """Where the stream of a run stands at a later update, behind its first pass."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    stops = frozenset({tokenizer.eos_token_id})
    stream = prepare_train(recipe.data, tokenizer, stops).stream
    assert stream is not None
    items = iter(stream)
    num_given = update * PER_UPDATE
    while "ledger" not in (place := stream.place_of(num_given) or {}):
        next(items)
    kept = read_place(checkpoint)
    assert kept is not None
    return {**place, "key": kept["key"]}


def say_it_is_of(checkpoint: Path, then: int, now: int, place: dict[str, Any] | None) -> None:
    """Publish a checkpoint of update `then` again, as one of update `now`."""

    def fill(draft: Draft) -> None:
        if place is not None:
            draft.put(STREAM_FILE, [json.dumps(place).encode()])
        for path in checkpoint.iterdir():
            if path.name not in (MANIFEST_FILE, OPTIMIZER_FILE, PROGRESS_FILE, STREAM_FILE):
                draft.put(path.name, [path.read_bytes()])
        progress = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        assert progress["update"] == then
        draft.put(PROGRESS_FILE, [json.dumps({**progress, "update": now}).encode()])
        state = load_values(checkpoint / OPTIMIZER_FILE)
        state["scheduler"]["last_epoch"] += now - then
        state["scheduler"]["_step_count"] += now - then
        draft.put(OPTIMIZER_FILE, value_parts(state))

    publish_checkpoint(checkpoint.with_name(f"checkpoint-{now}"), fill)
    shutil.rmtree(checkpoint)


if __name__ == "__main__":
    sys.exit(plainly(main))
