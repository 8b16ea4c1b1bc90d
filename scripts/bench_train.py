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
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SIDES = ("kit", "plain", "trl")
RANK, ALPHA, RATE = 16, 32, 2e-4
Ends = list[tuple[float, float]]
"""Of each update: the time, and the CPU seconds of the process so far."""
TOLERANCE = 1e-4
"""Of each update's loss, relative to plain transformers + peft in float32."""


@dataclass(frozen=True)
class Work:
    """What every side does, as a file that it reads."""

    model: str
    adapter: str
    batch: int
    accumulation: int
    recompute: str
    precision: str
    threads: int
    updates: list[list[dict[str, list[int]]]]
    """Rows of each update, with `input_ids` and `labels`."""

    @property
    def real_tokens(self) -> list[int]:
        return [sum(len(row["input_ids"]) for row in update) for update in self.updates]

    @property
    def supervised_tokens(self) -> list[int]:
        return [
            sum(label != -100 for row in update for label in row["labels"][1:])
            for update in self.updates
        ]


@dataclass(frozen=True)
class Outcome:
    """What one run of one side came to."""

    side: str
    losses: list[float]
    ends: list[float]
    """Seconds since the process was started, at the end of each update."""
    first_cpu_seconds: float
    """Of all its threads up to the first update, which neighbours lengthen little."""
    peak_bytes: int
    gauge_before: float
    """Products per second, in 10⁹ floating-point operations."""
    gauge_after: float

    @property
    def seconds(self) -> float:
        """From the first update's end to the last one's."""
        return self.ends[-1] - self.ends[0]


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
            outcomes.append([run(side, work, folder, arguments) for side in order])
    return told(outcomes, work, recipe, arguments)


def prepared(arguments: argparse.Namespace, folder: Path) -> tuple[Work, dict[str, Any]]:
    """The work, as the kit renders the rows and begins the adapter, and the recipe for it."""
    from qlora_kit.environment import probe_hardware
    from qlora_kit.processes import ALONE
    from qlora_kit.recipe import load_recipe
    from qlora_kit.report.reporter import SILENT
    from qlora_kit.stages.prepare import prepare

    rows = arguments.rows or "demo/commands"
    values = {
        "model": {"name_or_path": arguments.model},
        "quantization": {"load_in_4bit": True, "quant_type": "nf4", "double_quant": True},
        "lora": {"r": RANK, "alpha": ALPHA, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {"train": [{"path": rows}], "max_length": arguments.max_length},
        "train": {
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_steps": arguments.updates,
            "per_device_train_batch_size": arguments.batch,
            "gradient_accumulation_steps": arguments.accumulation,
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "precision": arguments.precision,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": {"auto": "auto", "none": False, "all": True}[
                arguments.recompute
            ],
        },
        "evaluate": {"perplexity": False},
        "export": {"merge": False},
        "run_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    recipe = load_recipe(path)
    ready = prepare(recipe, probe_hardware(), ALONE, SILENT)
    ready.adapted.model.save_pretrained(folder / "adapter")
    source = str(ready.base.source.folder)
    size = arguments.batch * arguments.accumulation
    sequences = ready.train.sequences
    updates = [
        [
            {"input_ids": list(row.input_ids), "labels": list(row.labels)}
            for row in (sequences[(n * size + k) % len(sequences)] for k in range(size))
        ]
        for n in range(arguments.updates)
    ]
    work = Work(
        model=source,
        adapter=str(folder / "adapter"),
        batch=arguments.batch,
        accumulation=arguments.accumulation,
        recompute=arguments.recompute,
        precision=arguments.precision,
        threads=arguments.threads,
        updates=updates,
    )
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    return work, values


def run(side: str, work: Work, folder: Path, arguments: argparse.Namespace) -> Outcome:
    """One side, once, in a process of its own that is watched from here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    if side == "trl" and arguments.trl is not None:
        paths = [str(arguments.trl), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    script = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    before = gauge(arguments.threads)
    started = time.time()
    log = folder / f"{side}.log"
    with log.open("w") as output:
        child = subprocess.Popen(script, env=environment, stdout=output, stderr=output)
        peak = watched(child)
    if child.returncode != 0:
        sys.exit(f"{side} failed:\n{log.read_text()[-3000:]}")
    found = json.loads((folder / f"{side}.json").read_text())
    return Outcome(
        side=side,
        losses=found["losses"],
        ends=[end - started for end, _ in found["ends"]],
        first_cpu_seconds=found["ends"][0][1],
        peak_bytes=peak,
        gauge_before=before,
        gauge_after=gauge(arguments.threads),
    )


def watched(child: subprocess.Popen[bytes]) -> int:
    """Wait for a process; returns the peak of its memory and its children's, in bytes."""
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            total = 0
            try:
                own = psutil.Process(child.pid)
                for process in (own, *own.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.Error:
                continue
            peak = max(peak, total)

    thread = threading.Thread(target=sample)
    thread.start()
    child.wait()
    ended.set()
    thread.join()
    return peak


def gauge(threads: int) -> float:
    """10⁹ operations per second of products as a small model has them, for about a second."""
    import torch

    torch.set_num_threads(threads)
    left, right = torch.randn(512, 576), torch.randn(1536, 576)
    rates = []
    ends = time.perf_counter() + 1.0
    while time.perf_counter() < ends:
        started = time.perf_counter()
        for _ in range(8):
            left @ right.T
        rates.append(8 * 2 * 512 * 576 * 1536 / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)


def moment() -> tuple[float, float]:
    return time.time(), time.process_time()


def run_side(side: str, folder: Path) -> int:
    """In the child."""
    work = Work(**json.loads((folder / "work.json").read_text()))
    losses, ends = {"kit": by_kit, "plain": by_plain, "trl": by_trl}[side](work, folder)
    (folder / f"{side}.json").write_text(json.dumps({"losses": losses, "ends": ends}))
    return 0


def by_kit(work: Work, folder: Path) -> tuple[list[float], Ends]:
    """`qlora-kit train`, from the recipe to the end of training."""
    import shutil

    import torch

    from qlora_kit.recipe import load_recipe
    from qlora_kit.report.reporter import Progress, Reporter
    from qlora_kit.run import run_recipe

    ends: Ends = []

    class Clock(Progress):
        def update(self, advance: int = 1, **fields: str) -> None:
            ends.append(moment())

    class Listening(Reporter):
        def progress(self, name: str, total: int) -> Any:
            from contextlib import nullcontext

            return nullcontext(Clock() if name == "training" else Progress())

        def say(self, text: str) -> None:
            print(text, flush=True)

    torch.set_num_threads(work.threads)
    shutil.rmtree(folder / "run", ignore_errors=True)
    run_recipe(load_recipe(folder / "recipe.yaml"), Listening())
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").open()]
    return [line["loss"] for line in lines if "loss" in line], ends


def by_plain(work: Work, _: Path) -> tuple[list[float], Ends]:
    """A loop as anybody would write it with transformers and peft."""
    import torch

    torch.set_num_threads(work.threads)
    model = quantized_with_adapter(work)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    ends: Ends = []
    for rows, supervised in zip(work.updates, work.supervised_tokens, strict=True):
        total = 0.0
        for start in range(0, len(rows), work.batch):
            batch = padded(rows[start : start + work.batch])
            with torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "bf16"):
                loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        ends.append(moment())
    return losses, ends


def by_trl(work: Work, folder: Path) -> tuple[list[float], Ends]:
    """TRL's SFTTrainer, whose adapter is put back to float32 so that losses can be compared."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(work.threads)
    ends: Ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(moment())

    rows = Dataset.from_list([row for update in work.updates for row in update])
    trainer = SFTTrainer(
        model=quantized_with_adapter(work),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=work.batch,
            gradient_accumulation_steps=work.accumulation,
            max_steps=len(work.updates),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim="adamw_torch",
            max_length=None,
            logging_steps=1,
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            bf16=work.precision == "bf16",
            use_cpu=True,
            gradient_checkpointing=work.recompute == "all",
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Clock()],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], ends


def quantized_with_adapter(work: Work) -> Any:
    """The base as bitsandbytes quantizes it, with the kit's first values of the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        work.model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    base.requires_grad_(False)
    model = PeftModel.from_pretrained(base, work.adapter, is_trainable=True)
    if work.recompute == "all":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """To the longest of the batch."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], fill: int) -> Any:
        return torch.tensor([one + [fill] * (length - len(one)) for one in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
    }


def needed_operations(work: Work, model_folder: str) -> float:
    """Of all updates but the first: forward, and the gradients of the inputs, of every linear layer
    over real tokens, and of the head over supervised ones.
    """
    from transformers import AutoConfig

    from qlora_kit.model.skeleton import build_skeleton

    skeleton = build_skeleton(AutoConfig.from_pretrained(model_folder), False)
    head = skeleton.model.get_output_embeddings().weight
    layers = sum(
        skeleton.model.get_submodule(name).weight.numel()
        for name in skeleton.linear_modules
        if not name.endswith("lm_head")
    )
    real, supervised = sum(work.real_tokens[1:]), sum(work.supervised_tokens[1:])
    return 4.0 * (real * layers + supervised * head.numel())


def told(
    rounds: list[list[Outcome]], work: Work, recipe: dict[str, Any], arguments: argparse.Namespace
) -> int:
    """Print and keep the figures. Returns the exit code."""
    by_side = {side: [one for row in rounds for one in row if one.side == side] for side in SIDES}
    by_side = {side: found for side, found in by_side.items() if found}
    supervised, real = sum(work.supervised_tokens[1:]), sum(work.real_tokens[1:])
    operations = needed_operations(work, work.model)
    print(
        f"{len(work.updates)} updates of {arguments.batch * arguments.accumulation} rows, "
        f"{real / (len(work.updates) - 1):,.0f} real and "
        f"{supervised / (len(work.updates) - 1):,.0f} supervised tokens each; recompute "
        f"{arguments.recompute}, {arguments.precision}, {arguments.threads} thread(s), "
        f"{arguments.rounds} rounds"
    )
    print(
        "side    supervised/s     real/s   peak MiB   first update s (CPU)   share of limit   gauge"
    )
    figures = {}
    for side, found in by_side.items():
        seconds = statistics.median(one.seconds for one in found)
        rate = statistics.median(one.gauge_before for one in found)
        drift = max(max(one.gauge_before, one.gauge_after) for one in found) / min(
            min(one.gauge_before, one.gauge_after) for one in found
        )
        figures[side] = {
            "supervised_per_second": supervised / seconds,
            "real_per_second": real / seconds,
            "peak_bytes": statistics.median(one.peak_bytes for one in found),
            "first_update_seconds": statistics.median(one.ends[0] for one in found),
            "first_update_cpu_seconds": statistics.median(one.first_cpu_seconds for one in found),
            "share_of_limit": operations / (rate * 1e9) / seconds,
            "gauge": rate,
            "gauge_drift": drift,
            "runs": [asdict(one) for one in found],
        }
        now = figures[side]
        print(
            f"{side:7} {now['supervised_per_second']:12.1f} {now['real_per_second']:10.1f} "
            f"{now['peak_bytes'] / 2**20:10,.0f} {now['first_update_seconds']:16.1f} "
            f"({now['first_update_cpu_seconds']:4.1f})"
            f"{now['share_of_limit']:16.2f} {rate:7.1f} (× {drift:.2f})"
        )
    ratios = against_kit(rounds)
    for side, of in ratios.items():
        print(f"kit : {side}  " + ", ".join(f"{name} {value}" for name, value in of.items()))
    worst = worst_difference(by_side)
    limit = TOLERANCE if work.precision == "fp32" else 2e-2
    print(f"largest relative difference of an update's loss: {worst:.2g} (at most {limit:g})")
    if arguments.json:
        kept = {"figures": figures, "ratios": ratios, "loss_difference": worst, "recipe": recipe}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.plot:
        draw(figures, arguments.plot)
    if worst > limit:
        print("The losses differ, so this is no comparison.", file=sys.stderr)
        return 1
    return 0


def against_kit(rounds: list[list[Outcome]]) -> dict[str, dict[str, str]]:
    """Median (lowest-highest) over the rounds: how often as fast, and the share of memory and of
    the time to the first update.
    """
    ratios: dict[str, dict[str, str]] = {}
    for side in SIDES[1:]:
        pairs = []
        for row in rounds:
            known = {one.side: one for one in row}
            if "kit" in known and side in known:
                pairs.append((known["kit"], known[side]))
        if pairs:
            ratios[side] = {
                "speed": spread([other.seconds / kit.seconds for kit, other in pairs]),
                "peak": spread([kit.peak_bytes / other.peak_bytes for kit, other in pairs]),
                "first update": spread([kit.ends[0] / other.ends[0] for kit, other in pairs]),
                "in CPU seconds": spread(
                    [kit.first_cpu_seconds / other.first_cpu_seconds for kit, other in pairs]
                ),
            }
    return ratios


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def worst_difference(by_side: dict[str, list[Outcome]]) -> float:
    reference = by_side.get("plain", next(iter(by_side.values())))[0].losses
    return max(
        abs(loss - wanted) / max(abs(wanted), 1e-12)
        for found in by_side.values()
        for one in found
        for loss, wanted in zip(one.losses, reference, strict=True)
    )


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for side, now in figures.items():
        axis.scatter(now["peak_bytes"] / 2**20, now["supervised_per_second"])
        axis.annotate(side, (now["peak_bytes"] / 2**20, now["supervised_per_second"]))
    axis.set_xlabel("peak memory, MiB")
    axis.set_ylabel("supervised tokens per second")
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
