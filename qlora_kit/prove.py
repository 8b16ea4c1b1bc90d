"""Proof, on the user's own machine, model and data, that a killed run loses nothing.

A short run that is left alone is compared with one that is killed (SIGKILL) after its first
checkpoint and gone on with by the same command. All of them are the real command line, in
processes of their own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.checkpoint.checkpoints import find_checkpoints
from qlora_kit.checkpoint.manifest import read_manifest
from qlora_kit.checkpoint.run_directory import OPTIMIZER_FILE, RunDirectory
from qlora_kit.errors import RunError
from qlora_kit.recipe import EvaluateSpec, ExportSpec, Recipe, save_recipe
from qlora_kit.report.reporter import SILENT, Reporter

DEFAULT_UPDATES = 6
_SAVE_EVERY = 2
_POLL_SECONDS = 0.02
# Each with twice the updates of the one before, where a run ends before it can be killed.
_TRIES = 6


@dataclass(frozen=True)
class Trace:
    """What a run leaves that tells whether it is the same as another."""

    losses: tuple[float, ...]
    order: str
    """Digest over the rows of every update, in order."""
    adapter: str
    """SHA-256 of the adapter's file."""
    optimizer: str
    """SHA-256 of the file that the newest checkpoint keeps of the optimizer and its schedule."""
    seconds: float


@dataclass(frozen=True)
class Proof:
    """An uninterrupted run, one that was killed and gone on with, and where they differ."""

    whole: Trace
    resumed: Trace
    killed_after: int
    """Updates that the killed run had logged."""
    resumed_from: int
    repeated: Trace | None = None
    """A second uninterrupted run, made where the first two differ: what the hardware itself
    does not repeat.
    """

    @property
    def holds(self) -> bool:
        """Whether resuming is exact, or as exact as the hardware repeats itself."""
        if differences(self.whole, self.resumed) == ():
            return True
        if self.repeated is None or not differences(self.whole, self.repeated):
            return False
        if self.whole.order != self.resumed.order:
            return False
        return apart(self.whole, self.resumed) <= 10 * apart(self.whole, self.repeated)


def differences(one: Trace, other: Trace) -> tuple[str, ...]:
    """Names of what is not the same, bit for bit."""
    names = ("losses", "order", "adapter", "optimizer")
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))


def apart(one: Trace, other: Trace) -> float:
    """The largest difference of a loss, in nats per token."""
    return max((abs(a - b) for a, b in zip(one.losses, other.losses, strict=False)), default=0.0)


def prove_resume(
    recipe: Recipe, folder: Path, num_updates: int = DEFAULT_UPDATES, reporter: Reporter = SILENT
) -> Proof:
    """Run the recipe's first updates twice in `folder`, once with a kill in between.

    Raises:
        RunError: one of the runs ended with an error, or all of them before they could be killed.
    """
    for _ in range(_TRIES):
        whole = _shortened(recipe, folder / "whole", num_updates)
        parts = _shortened(recipe, folder / "killed", num_updates)
        reporter.say(f"proof     {num_updates} updates without a stop …")
        first = _finished(whole)
        reporter.say(
            f"          {first.seconds:.0f} s, loss {first.losses[0]:.4f} → {first.losses[-1]:.4f}"
        )
        killed = _killed(parts)
        if killed is not None:
            break
        reporter.say("          the run to be killed ended too soon; with twice as many …")
        for name in ("whole", "killed"):
            shutil.rmtree(folder / name)
        num_updates *= 2
    else:
        raise RunError("the run to be killed ended too soon; ask for more updates (--updates).")
    killed_after, resumed_from = killed
    reporter.say(
        f"          killed (SIGKILL) after update {killed_after}; checkpoint-{resumed_from} is the "
        "newest …"
    )
    second = _finished(parts)
    reporter.say(f"          gone on with to the end: {second.seconds:.0f} s")
    repeated = None
    if differences(first, second):
        reporter.say("          not the same; once more without a stop, to see what repeats …")
        repeated = _finished(_shortened(recipe, folder / "repeated", num_updates))
    return Proof(first, second, killed_after, resumed_from, repeated)


def _shortened(recipe: Recipe, folder: Path, num_updates: int) -> Path:
    """The recipe as a file: its own model, data and optimizer, few updates, and no more."""
    train = recipe.train
    by_loss = train.lr_scheduler_type == "reduce_lr_on_plateau"
    warmup = train.warmup_steps if train.warmup_steps < num_updates else num_updates // 2
    changed = train.model_copy(
        update={
            "max_steps": num_updates,
            "warmup_steps": warmup,
            "logging_steps": 1,
            "eval_strategy": "steps" if by_loss else "no",
            "eval_steps": _SAVE_EVERY if by_loss else None,
            "save_strategy": "steps",
            "save_steps": _SAVE_EVERY,
            "save_minutes": None,
            "save_total_limit": 2,
            "keep_best": False,
            "report_to": (),
        }
    )
    short = recipe.model_copy(
        update={
            "train": changed,
            "evaluate": EvaluateSpec(perplexity=False),
            "export": ExportSpec(),
            "run_dir": str(folder),
        }
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.yaml")
    save_recipe(short, path)
    return path


def _finished(recipe: Path) -> Trace:
    start = time.monotonic()
    done = subprocess.run(_command(recipe), capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(
            f"`{' '.join(_command(recipe)[1:])}` ended with exit code {done.returncode}:\n"
            f"{(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return _trace(recipe.with_suffix(""), time.monotonic() - start)


def _killed(recipe: Path) -> tuple[int, int] | None:
    """Start a run, kill it once it has gone past a checkpoint; updates logged, and checkpoint.

    None where it ended before it could be killed.
    """
    folder = recipe.with_suffix("")
    run = subprocess.Popen(
        _command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while run.poll() is None and not _is_past_a_checkpoint(folder):
            time.sleep(_POLL_SECONDS)
    finally:
        run.kill()
        _, said = run.communicate()
    kept = find_checkpoints(folder)
    if RunDirectory(folder).is_finished:
        return None
    if not kept:
        raise RunError(f"the run to be killed ended before its first checkpoint:\n{said[-2000:]}")
    return len(_losses(folder)), int(kept[0].name.rpartition("-")[2])


def _is_past_a_checkpoint(folder: Path) -> bool:
    """Whether one is there, and updates were made since that a kill takes away."""
    return len(_losses(folder)) > _SAVE_EVERY and bool(find_checkpoints(folder))


def _command(recipe: Path) -> list[str]:
    return [sys.executable, "-m", "qlora_kit", "train", str(recipe)]


def _losses(folder: Path) -> tuple[float, ...]:
    log = RunDirectory(folder).log
    if not log.is_file():
        return ()
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return tuple(one["loss"] for one in map(json.loads, lines) if "loss" in one)


def _trace(folder: Path, seconds: float) -> Trace:
    run = RunDirectory(folder)
    last = find_checkpoints(folder)[0]
    progress = json.loads((last / "progress.json").read_text(encoding="utf-8"))
    return Trace(
        losses=_losses(folder),
        order=progress["order_digest"],
        adapter=hashlib.sha256(
            (run.adapter / "adapter_model.safetensors").read_bytes()
        ).hexdigest(),
        optimizer=read_manifest(last).files[OPTIMIZER_FILE].sha256,
        seconds=seconds,
    )
