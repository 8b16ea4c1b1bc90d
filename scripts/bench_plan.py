"""What `qlora-kit plan` predicts beside what is measured: 20 shapes of model, batch and adapter.

python scripts/bench_plan.py
python scripts/bench_plan.py --only llama-base gpt2 --json found.json
python scripts/bench_plan.py --families
python scripts/bench_plan.py --aware
python scripts/bench_plan.py --dora
python scripts/bench_plan.py --padded --precision bf16 --only mistral phi3

Every shape is a model of random weights that is trained for a few updates through `run_recipe`,
in a process of its own, twice: once for the memory of the process, and then under torch's profiler,
which notes whatever the allocator of tensors gives and takes back, also inside operations. The
prediction is the command line's, from the recipe, its rows and the headers alone. The exit code is
1 where it is off by more than 5 % (tensors, training) or 10 % (process, the whole run).
`--families` takes one shape of each of many architectures instead, `--aware` training that
quantizes what it trains, `--dora` DoRA.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, output_file, plainly
from plan_bench.cases import AWARE, CASES, DORA, FAMILIES, Case, configuration_of

from qlora_kit.__main__ import begin

MOST_OFF = {"tensors": 0.05, "process": 0.10}
_MIB = 2**20
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ALL_CASES = (*CASES, *FAMILIES, *AWARE, *DORA)
_BESIDE_TENSORS = ("framework", "holes in the heap")


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[one.name for one in _ALL_CASES],
        metavar="SHAPE",
        help=f"of {', '.join(one.name for one in _ALL_CASES)}; unset: the first 20",
    )
    parser.add_argument(
        "--families", action="store_true", help="unless --only: other architectures"
    )
    parser.add_argument(
        "--aware", action="store_true", help="unless --only: quantizing in training"
    )
    parser.add_argument("--dora", action="store_true", help="unless --only: DoRA")
    parser.add_argument("--padded", action="store_true", help="batches that could lie in one row")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.child)
    named = [one for one in _ALL_CASES if one.name in (arguments.only or ())]
    others = (arguments.families, FAMILIES), (arguments.aware, AWARE), (arguments.dora, DORA)
    chosen = named or next((cases for is_wanted, cases in others if is_wanted), CASES)
    found = []
    for one in chosen:
        with tempfile.TemporaryDirectory(prefix="bench-plan-") as scratch:
            recipe = prepared(one, Path(scratch), arguments.precision, arguments.padded)
            row: dict[str, Any] = {"case": asdict(one)}
            real = measured(recipe, arguments.threads)
            predicted = prediction(recipe, arguments.threads)
            row["by_phase"] = real["by_phase"]
            for what in MOST_OFF:
                ratio = predicted[what] / real[what]
                row[what] = {"measured": real[what], "predicted": predicted[what], "ratio": ratio}
            found.append(row)
            print(line_of(row), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    off = [row["case"]["name"] for row in found if is_off(row)]
    print(
        f"{len(found) - len(off)} of {len(found)} within bounds"
        + f"; not: {', '.join(off)}" * bool(off)
    )
    return 1 if off else 0


def line_of(row: dict[str, Any]) -> str:
    parts = [f"{row['case']['name']:18}"]
    for what in MOST_OFF:
        if what in row:
            one = row[what]
            parts.append(
                f"{what} predicted {one['predicted'] / _MIB:8,.1f} measured "
                f"{one['measured'] / _MIB:8,.1f} MiB  ratio {one['ratio']:.3f}"
            )
    return "  ".join(parts) + ("  OFF" if is_off(row) else "")


def is_off(row: dict[str, Any]) -> bool:
    return any(abs(row[what]["ratio"] - 1) > most for what, most in MOST_OFF.items() if what in row)


def prepared(one: Case, folder: Path, precision: str = "fp32", is_padded: bool = False) -> Path:
    """A model, rows and a recipe in `folder`."""
    make_model(one, folder / "model")
    rows = folder / "rows.jsonl"
    lines = []
    for number in range(4 * one.batch):
        share = 1 - 0.5 * (number % one.batch) / one.batch if one.ragged else 2
        prompt = f"{number:05}".ljust(int(one.tokens * share / 4), "?")
        lines.append(json.dumps({"prompt": prompt, "completion": "a" * (one.tokens - len(prompt))}))
    rows.write_text("\n".join(lines) + "\n")
    lora = {"r": one.rank, "alpha": 16, **one.lora}
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "attn_implementation": one.attention},
        "quantization": {"load_in_4bit": one.bits == 4, "compute_dtype": _DTYPES[precision]},
        **({"quantization_aware": one.aware} if one.aware else {}),
        **({} if one.aware.get("train") == "full" else {"lora": lora}),
        "data": {
            "train": [{"path": str(rows)}],
            "max_length": one.tokens,
            "overlength": "truncate",
            **({"padding_free": False} if is_padded else {}),
        },
        "train": {
            "max_steps": 2,
            "warmup_steps": 0,
            "per_device_train_batch_size": one.batch,
            "gradient_accumulation_steps": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            **one.train,
        },
        "evaluate": {"perplexity": False},
        "export": {"merge": False},
        "run_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def make_model(one: Case, folder: Path) -> None:
    """Random weights, with a tokenizer of single bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qlora_kit.plan.small_run import save_byte_tokenizer

    save_byte_tokenizer(folder)
    torch.manual_seed(0)
    positions = {} if one.family == "gpt2" else {"max_position_embeddings": 4096}
    config = AutoConfig.for_model(one.family, **configuration_of(one), **positions)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def measured(recipe: Path, threads: int) -> dict[str, int]:
    """Bytes of tensors while training and of the process, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{recipe} failed:\n{done.stderr[-3000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(recipe: Path) -> int:
    """In the child."""
    from qlora_kit.environment import settle_upstream

    settle_upstream()
    import torch

    from qlora_kit.recipe import load_recipe
    from qlora_kit.run import run_recipe

    result = run_recipe(load_recipe(recipe))
    assert result is not None
    memory = json.loads(result.run.summary.read_text())["memory"]
    del result
    reporter = profiling()
    reporter.left_over = alive(torch)
    run_recipe(load_recipe(recipe, (f"run_dir={recipe.parent / 'again'}",)), reporter)
    print(
        json.dumps(
            {
                "tensors": reporter.peak,
                "process": memory["peak_bytes"],
                "by_phase": memory["host_peak_bytes"],
            }
        )
    )
    return 0


def profiling() -> Any:
    """A reporter that has the allocator watched while training goes on."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from qlora_kit.report.reporter import Progress, Reporter

    class Profiling(Reporter):
        peak = 0
        left_over = 0
        """Of the run before this one, whose model is not collected."""

        @contextmanager
        def progress(self, name: str, total: int) -> Iterator[Progress]:
            if name != "training":
                yield Progress()
                return
            forget_codes()
            before = alive(torch) - self.left_over
            watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            watch.start()
            yield Progress()
            watch.stop()
            now = most = 0
            for event in watch.profiler.kineto_results.events():
                if event.name() == "[memory]":
                    now += event.nbytes()
                    most = max(most, now)
            self.peak = before + most

    return Profiling()


def forget_codes() -> None:
    """Of weights that are quantized in training: the profiler takes no notice where what was there
    before it goes, and they go in the first update.
    """
    from qlora_kit.model.qat.linear import Held

    for one in gc.get_objects():
        if isinstance(one, Held):
            one.codes, one.made_of = None, ()


def alive(torch: Any) -> int:
    """Bytes of every tensor that there is, each storage counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor):
            state = getattr(one, "quant_state", None)
            beside = [] if state is None else [state.absmax, state.code]
            if state is not None and state.nested:
                beside += [state.offset, state.state2.absmax, state.state2.code]
            for tensor in (one, *beside):
                storage = tensor.untyped_storage()
                if storage.device.type == "cpu":
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def prediction(recipe: Path, threads: int) -> dict[str, int]:
    """Bytes of tensors while training, and of the process in the whole run, by the command line:
    what this process holds of the shapes before is no part of it.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "qlora_kit", "plan", str(recipe), "--rows", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.stdout:
        sys.exit(f"{recipe} cannot be planned:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout)
    training: dict[str, int] = found["moments"]["training"]["bytes"]
    beside = sum(training.get(name, 0) for name in _BESIDE_TENSORS)
    return {"tensors": sum(training.values()) - beside, "process": found["peak_bytes"]}


if __name__ == "__main__":
    begin()
    sys.exit(plainly(main))
