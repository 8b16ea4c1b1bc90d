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
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from bench_plan import Case, case, configuration_of, prediction, prepared
from plainly import Parser, at_least, existing_file, output_file, plainly, plot_file

from qlora_kit.__main__ import begin

MOST_OFF, MOST_OFF_IN_MEMORY = 0.25, 0.1
UPDATES = 3
_MIB = 2**20
_TOKENIZER_ENTRIES = 8192
_BASE = case(
    "base", "llama", 576, 1536, 4, 9, 3, _TOKENIZER_ENTRIES, 512, 1, 16,
    train={"gradient_checkpointing": False, "optim": "adamw_torch"},
)  # fmt: skip
_ROWS = 64


def _width(hidden: int) -> Case:
    heads = hidden // 64
    return replace(_BASE, hidden=hidden, inner=hidden * 8 // 3, heads=heads, kv_heads=heads // 3)


SWEEPS: dict[str, Sequence[Case]] = {
    "length": [replace(_BASE, tokens=n) for n in (256, 512, 1024, 2048, 4096, 8192)],
    "layers": [replace(_BASE, layers=n) for n in (2, 4, 8, 16)],
    "width": [_width(n) for n in (192, 384, 576, 1152, 1728)],
    "rank": [replace(_BASE, rank=n) for n in (4, 16, 64, 256)],
    "vocabulary": [replace(_BASE, vocabulary=n) for n in (8192, 32768, 131072)],
    "batch": [replace(_BASE, batch=n, tokens=256) for n in (1, 2, 4, 8)],
    "recompute": [replace(_BASE, train={**_BASE.train, "gradient_checkpointing": True})],
}
_DEMO = replace(
    _BASE, name="SmolLM2-135M, 2 x 256", layers=30, vocabulary=49152, tokens=256, batch=2
)
_8B = ("llama", 4096, 14336, 32, 32, 8, 128256)
_70B = ("llama", 8192, 28672, 80, 64, 8, 128256)
_ALL = {"gradient_checkpointing": True}
LARGE = {
    one.name: one
    for one in (
        _DEMO,
        case("8B, 2,048, no recompute", *_8B, 2048, 1, 16, train=_BASE.train),
        case("8B, 2,048", *_8B, 2048, 1, 16, train=_ALL),
        case("8B, 8,192", *_8B, 8192, 1, 16, train=_ALL),
        case("70B, 2,048", *_70B, 2048, 1, 16, train=_ALL),
    )
}
"""Whose time is extrapolated; all layers recompute but where it says otherwise."""
# Peaks of dense products in bfloat16, 10¹² operations a second, as their makers say.
GPUS = (("RTX 4090", 165.2), ("A100", 312.0), ("H100", 989.4))
PRODUCT_SHARE = 0.5
FITTING = (("RTX 4090", 24), ("A100", 40), ("A100 80GB, H100", 80))
"""With their memory in GiB."""
ROW_COUNTS = (64, 1024, 16384)


@dataclass(frozen=True)
class Terms:
    """What an update has to compute, in 10⁹ floating-point operations (a product and a sum are 2).

    The backward pass takes as much again as the forward pass for frozen weights (the gradient of
    the input alone), and twice as much for the adapter; layers that recompute do the forward pass
    twice.
    """

    products: float
    """With frozen weights, the head among them."""
    adapter: float
    attention: float
    """Of queries with keys and of scores with values; a causal mask leaves half of them."""
    elements: float
    """Numbers that pass through norms, activations and residual sums, in 10⁹."""
    optimizer: float
    """Trained parameters, in 10⁹."""

    @classmethod
    def of(cls, one: Case) -> Terms:
        tokens = one.tokens * one.batch
        linear, adapter = parameters_of(one)
        again = 1 if one.train["gradient_checkpointing"] else 0
        supervised = tokens / 2  # see `bench_plan.prepared`
        head = supervised * one.hidden * one.vocabulary
        scores = one.layers * one.batch * one.tokens**2 / 2 * one.hidden
        return cls(
            products=2 * (tokens * linear * (2 + again) + 2 * head) / 1e9,
            adapter=2 * tokens * adapter * (3 + again) / 1e9,
            attention=2 * 2 * scores * (3.5 + again) / 1e9,
            elements=tokens * one.layers * (4 * one.hidden + 3 * one.inner) * (2 + again) / 1e9,
            optimizer=adapter / 1e9,
        )

    def as_row(self) -> list[float]:
        return [*asdict(self).values(), 1.0]


def parameters_of(one: Case) -> tuple[int, int]:
    """(of all linear layers but the head, of the adapter)"""
    kv = one.kv_heads * (one.hidden // one.heads)
    # Each of the seven projections has its own A and B.
    sizes = [(one.hidden, one.hidden), (one.hidden, kv), (one.hidden, kv), (one.hidden, one.hidden)]
    sizes += 2 * [(one.hidden, one.inner)] + [(one.inner, one.hidden)]
    linear = one.layers * sum(inner * outer for inner, outer in sizes)
    return linear, one.layers * one.rank * sum(inner + outer for inner, outer in sizes)


@dataclass(frozen=True)
class Holds:
    """What a process holds when most is alive, in MiB, as it can be counted on paper: float32 on a
    CPU, where unpacked weights stay as long as no layer recomputes.
    """

    weights: float
    """4.127 bits of each number, and 32 more of those that stay unpacked."""
    vocabulary: float
    adapter: float
    """Parameters, gradients, and two states of AdamW."""
    activations: float
    """Of each token and layer twice the hidden states, queries, keys and values, gate and up; its
    input alone where it recomputes, and one layer's whole."""
    logits: float
    """Of a chunk of supervised places."""
    passing: float
    """What a forward pass lets go again, of whose blocks some stay behind as holes."""

    @classmethod
    def of(cls, one: Case) -> Holds:
        linear, adapter = parameters_of(one)
        tokens = one.tokens * one.batch
        kv = one.kv_heads * (one.hidden // one.heads)
        a_layer = 4 * one.hidden + 2 * kv + 2 * one.inner
        recomputes = bool(one.train["gradient_checkpointing"])
        kept = one.layers * one.hidden + a_layer if recomputes else one.layers * a_layer
        passing = tokens * one.layers * (3 * one.hidden + 2 * one.inner)
        return cls(
            weights=linear * (4.127 / 8 + 4 * (not recomputes)) / _MIB,
            vocabulary=4 * one.vocabulary * one.hidden / _MIB,
            adapter=16 * adapter / _MIB,
            activations=4 * tokens * kept / _MIB,
            logits=min(32.0, 4 * tokens / 2 * one.vocabulary / _MIB),
            passing=4 * passing * (1 + recomputes) / _MIB,
        )

    def as_row(self) -> list[float]:
        return [*asdict(self).values(), 1.0]


HOLD_NAMES = ("weights", "vocabulary", "adapter", "activations", "logits", "passing", "process")
TERM_NAMES = ("products", "adapter", "attention", "elements", "optimizer", "each update")


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
            real, _ = run(replace(_BASE, tokens=128), count, arguments.threads, False)
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
        return measured, prediction(recipe) if predicts else None


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


def rows_of(sweep: str, shapes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [one for one in shapes if sweep in one["sweeps"]]
    return sorted(found, key=lambda one: quantity_of(sweep, one["case"]))


def quantity_of(sweep: str, one: dict[str, Any]) -> int:
    """What a sweep varies, of one of its shapes."""
    return int(
        one[{"length": "tokens", "width": "hidden", "recompute": "layers"}.get(sweep, sweep)]
    )


def value_of(sweep: str, one: dict[str, Any]) -> str:
    return "all layers" if sweep == "recompute" else f"{quantity_of(sweep, one):,}"


def tell_fit(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """Print the fitted rates, and how each shape stands to a fit without it; returns those off."""
    cases = [Case(**one["case"]) for one in shapes]
    terms = np.array([Terms.of(one).as_row() for one in cases])
    seconds = np.array([min(one["cpu_seconds"]) for one in shapes])
    if len(cases) <= terms.shape[1] + 1:
        print("too few shapes for a fit")
        return []
    rates = fitted(terms, seconds)
    print("\nfit, seconds for 10⁹ of each (operations, numbers, parameters), and for an update:")
    for name, rate in zip(TERM_NAMES, rates, strict=True):
        print(f"  {name:12} {rate:.4g}" + (f"  {1 / rate:,.1f} 10⁹/s" if rate > 0 else ""))
    return without_each(shapes, terms, seconds, "s", MOST_OFF)


def tell_memory_fit(shapes: Sequence[dict[str, Any]]) -> list[str]:
    """The same of the memory of the process."""
    holds = np.array([Holds.of(Case(**one["case"])).as_row() for one in shapes])
    peaks = np.array([max(one["process"]) / _MIB for one in shapes])
    if len(shapes) <= holds.shape[1] + 1:
        return []
    shares = fitted(holds, peaks)
    print("\nfit, MiB of the process for each that is counted, and for the process itself:")
    for name, share in zip(HOLD_NAMES, shares, strict=True):
        print(f"  {name:12} {share:.4g}")
    return without_each(shapes, holds, peaks, "MiB", MOST_OFF_IN_MEMORY)


def without_each(
    shapes: Sequence[dict[str, Any]],
    terms: np.ndarray,
    values: np.ndarray,
    unit: str,
    most_off: float,
) -> list[str]:
    """Print how each shape stands to a fit that was made without it; returns those that are off."""
    off = []
    print("each shape by a fit without it:")
    for number, row in enumerate(shapes):
        rest = np.arange(len(shapes)) != number
        told = float(terms[number] @ fitted(terms[rest], values[rest]))
        ratio = told / values[number]
        name = f"{row['sweeps'][0]} {value_of(row['sweeps'][0], row['case'])}"
        is_off = bool(abs(ratio - 1) > most_off)
        off += [name] * is_off
        print(
            f"  {name:20} {told:10,.2f} of {values[number]:10,.2f} {unit}  {ratio:.2f}"
            + "  OFF" * is_off
        )
    return off


def extrapolated(shapes: Sequence[dict[str, Any]]) -> str:
    """What the fit says of models that were not measured. Of a GPU it knows the share of the time
    that products have here, and assumes that products reach `PRODUCT_SHARE` of its peak and that
    everything else is as much faster as they are; small models leave a GPU idle, and are left out.
    """
    terms = np.array([Terms.of(Case(**one["case"])).as_row() for one in shapes])
    rates = fitted(terms, np.array([min(one["cpu_seconds"]) for one in shapes]))
    columns = [
        "10⁹/token",
        "products",
        "here",
        *(f"{n} {name}" for n in (1, 8) for name, _ in GPUS),
    ]
    lines = [
        "",
        "EXTRAPOLATED, tokens per second",
        " " * 26 + "".join(f"{one:>12}" for one in columns),
    ]
    for name, one in LARGE.items():
        row = np.array(Terms.of(one).as_row())
        seconds = float(row @ rates)
        share = float(row[0] * rates[0]) / seconds
        tokens, operations = one.tokens * one.batch, float(sum(row[:3]))
        on_gpus = [
            count * tokens * 1e3 * peak * PRODUCT_SHARE * share / operations
            for count in (1, 8)
            for _, peak in GPUS
        ]
        values = [f"{operations / tokens:.1f}", f"{share:.0%}", f"{tokens / seconds:.2f}"]
        values += [f"{speed:,.0f}" for speed in on_gpus] if one is not _DEMO else []
        lines.append(f"{name:26}" + "".join(f"{value:>12}" for value in values))
    return "\n".join(lines)


def memory_extrapolated(shapes: Sequence[dict[str, Any]]) -> str:
    """Of this CPU by the fit, in float32; of GPUs by `plan`, in bfloat16 with the same optimizer.
    Of eight GPUs each holds all of it.
    """
    holds = np.array([Holds.of(Case(**one["case"])).as_row() for one in shapes])
    shares = fitted(holds, np.array([max(one["process"]) / _MIB for one in shapes]))
    lines = [
        "",
        "EXTRAPOLATED, GiB: of this CPU by the fit, by plan of each of one or eight GPUs",
        " " * 26 + "".join(f"{one:>14}" for one in ("here", "a GPU", "fits")),
    ]
    for name, one in LARGE.items():
        here = float(np.array(Holds.of(one).as_row()) @ shares) / 1024
        needed = planned_bytes(one) / 2**30
        fits = [gpu for gpu, memory_gib in FITTING if needed <= memory_gib]
        told = f"{here:14.1f}{needed:14.1f}"
        lines.append(f"{name:26}{told}  {', '.join(fits) or 'none of them'}")
    return "\n".join(lines)


def planned_bytes(one: Case) -> int:
    """What `plan` says of an H100's memory, from a configuration and a tokenizer alone."""
    from transformers import AutoConfig

    from qlora_kit.model.vocabulary import load_vocabulary
    from qlora_kit.plan.gpus import known_gpu
    from qlora_kit.plan.plan import Planner
    from qlora_kit.plan.small_run import save_byte_tokenizer
    from qlora_kit.recipe import Recipe

    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
        save_byte_tokenizer(Path(scratch))
        values = configuration_of(one)
        config = AutoConfig.for_model(one.family, **values, max_position_embeddings=one.tokens)
        config.save_pretrained(scratch)
        recipe = Recipe.model_validate(
            {
                "model": {"name_or_path": scratch},
                "lora": {"r": one.rank},
                "data": {"train": [{"path": "rows.jsonl"}], "max_length": one.tokens},
                "train": {**one.train, "per_device_train_batch_size": one.batch},
                "evaluate": {"perplexity": False},
                "run_dir": f"{scratch}/run",
            }
        )
        hardware = known_gpu("H100")
        assert hardware.device_memory_bytes is not None
        planner = Planner(load_vocabulary(recipe.model), hardware, hardware.device_memory_bytes)
        return planner.plan(recipe).peak.num_bytes


def fitted(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative least squares of relative errors, by Lawson and Hanson's method."""
    from scipy.optimize import nnls

    rates: np.ndarray = nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return rates


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
