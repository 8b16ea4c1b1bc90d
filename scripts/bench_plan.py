"""What `qlora-kit plan` predicts beside what is measured: 20 shapes of model, batch and adapter.

python scripts/bench_plan.py
python scripts/bench_plan.py --only llama-base gpt2 --json found.json

Every shape is a model of random weights that is trained for a few updates through `run_recipe`,
in a process of its own, twice: once for the memory of the process, and then under torch's profiler,
which notes whatever the allocator of tensors gives and takes back, also inside operations. The
prediction is made here, from the recipe and the headers alone. The exit code is 1
where it is off by more than 5 % (tensors, training) or 10 % (process, the whole run).
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plainly import Parser, at_least, output_file, plainly

from qlora_kit.__main__ import begin

MOST_OFF = {"tensors": 0.05, "process": 0.10}
_MIB = 2**20
_BESIDE_TENSORS = ("framework", "holes in the heap")


@dataclass(frozen=True)
class Case:
    """One shape: of the model, and of what it is trained on."""

    name: str
    family: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    batch: int
    rank: int
    train: dict[str, Any]
    ragged: bool = False
    bits: int = 4
    is_tied: bool = True
    attention: str = "auto"


def case(name: str, family: str = "llama", *sizes: int, **others: Any) -> Case:
    hidden, inner, layers, heads, kv_heads, vocabulary, tokens, batch, rank = sizes
    train = others.pop("train", {})
    return Case(
        name,
        family,
        hidden,
        inner,
        layers,
        heads,
        kv_heads,
        vocabulary,
        tokens,
        batch,
        rank,
        train,
        **others,
    )


_ALL, _NONE = {"gradient_checkpointing": True}, {"gradient_checkpointing": False}
_ACCUMULATED = {"gradient_accumulation_steps": 2}
CASES = (
    case("llama-base", "llama", 256, 1024, 6, 4, 2, 8192, 256, 4, 16),
    case("llama-long", "llama", 256, 768, 4, 4, 4, 8192, 1024, 1, 16),
    case("llama-wide", "llama", 768, 2048, 3, 12, 4, 4096, 128, 4, 8),
    case("llama-deep", "llama", 192, 512, 16, 3, 3, 4096, 256, 2, 8),
    case("llama-all", "llama", 256, 1024, 8, 4, 2, 8192, 512, 4, 16, train=_ALL),
    case("llama-none", "llama", 256, 1024, 8, 4, 2, 8192, 512, 2, 16, train=_NONE),
    case("llama-rank-64", "llama", 512, 1536, 4, 8, 2, 8192, 256, 2, 64),
    case("llama-rank-4", "llama", 512, 1536, 4, 8, 2, 8192, 256, 2, 4),
    case("llama-vocabulary", "llama", 256, 512, 4, 4, 4, 64000, 256, 4, 8),
    case("llama-untied", "llama", 384, 1024, 4, 6, 6, 32000, 256, 2, 16, is_tied=False),
    case("llama-batch-16", "llama", 256, 768, 4, 4, 2, 8192, 128, 16, 8),
    case("llama-ragged", "llama", 256, 768, 4, 4, 2, 8192, 384, 4, 8, ragged=True),
    case("llama-accumulated", "llama", 512, 1024, 3, 8, 8, 4096, 256, 2, 64, train=_ACCUMULATED),
    case(
        "llama-adamw", "llama", 512, 1024, 3, 8, 8, 4096, 128, 1, 64, train={"optim": "adamw_torch"}
    ),
    case(
        "llama-plain",
        "llama",
        256,
        768,
        4,
        4,
        2,
        8192,
        256,
        2,
        8,
        train={"fused_loss": False, "fused_lora": False},
    ),
    case("llama-eager", "llama", 256, 768, 4, 4, 2, 8192, 512, 2, 8, attention="eager"),
    case("llama-unquantized", "llama", 384, 1024, 4, 6, 6, 8192, 256, 2, 8, bits=16),
    case("qwen2", "qwen2", 384, 1536, 5, 6, 2, 32000, 256, 3, 16),
    case("gemma", "gemma", 256, 1024, 5, 4, 1, 32000, 256, 3, 16),
    case("gpt2", "gpt2", 384, 1536, 5, 6, 6, 8192, 256, 3, 16),
)


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[one.name for one in CASES],
        metavar="SHAPE",
        help=f"of {', '.join(one.name for one in CASES)}; unset: all of them",
    )
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--json", type=output_file, help="write the figures here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(arguments.child)
    chosen = [one for one in CASES if not arguments.only or one.name in arguments.only]
    found = []
    for one in chosen:
        with tempfile.TemporaryDirectory(prefix="bench-plan-") as scratch:
            recipe = prepared(one, Path(scratch))
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


def prepared(one: Case, folder: Path) -> Path:
    """A model, rows and a recipe in `folder`."""
    make_model(one, folder / "model")
    rows = folder / "rows.jsonl"
    lines = []
    for number in range(4 * one.batch):
        share = 1 - 0.5 * (number % one.batch) / one.batch if one.ragged else 2
        prompt = f"{number:05}".ljust(int(one.tokens * share / 4), "?")
        lines.append(json.dumps({"prompt": prompt, "completion": "a" * (one.tokens - len(prompt))}))
    rows.write_text("\n".join(lines) + "\n")
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "attn_implementation": one.attention},
        "quantization": {"load_in_4bit": one.bits == 4, "compute_dtype": "float32"},
        "lora": {"r": one.rank, "alpha": 16},
        "data": {
            "train": [{"path": str(rows)}],
            "max_length": one.tokens,
            "overlength": "truncate",
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


def configuration_of(one: Case) -> dict[str, Any]:
    """Of the model's sizes, as its family names them."""
    values: dict[str, Any] = {"vocab_size": one.vocabulary, "eos_token_id": 1, "pad_token_id": 0}
    values |= {"bos_token_id": 1, "tie_word_embeddings": one.is_tied}
    if one.family == "gpt2":
        values |= {"n_embd": one.hidden, "n_layer": one.layers, "n_head": one.heads}
        values |= {"n_inner": one.inner, "n_positions": 2048}
    else:
        values |= {"hidden_size": one.hidden, "num_hidden_layers": one.layers}
        values |= {"intermediate_size": one.inner, "num_attention_heads": one.heads}
        values |= {"num_key_value_heads": one.kv_heads, "head_dim": one.hidden // one.heads}
    return values


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
