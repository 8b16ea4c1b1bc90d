"""One run of one side in a process of its own, watched from here."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from train_bench.registry import SIDES, Turn

SCRIPTS = Path(__file__).parent.parent

_YOUNG_SECONDS = 0.5
_LAST_LINES, _WIDEST = 20, 400
"""Of the log of a side that failed: lines, and characters of one."""

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
}
"""Other tools ask hubs for versions and report what they do, which would be timed as well."""


@dataclass(frozen=True)
class Outcome:
    """What one run of one side came to."""

    label: str
    losses: list[float]
    ends: list[float]
    """Seconds since the process was started, at the end of each update."""
    cpu_ends: list[float]
    """CPU seconds of all its threads up to then, which neighbours lengthen little."""
    recomputes: str
    versions: dict[str, str]
    peak_bytes: int
    """Of the host's memory, of the process and its children."""
    device_peaks: dict[str, int]
    """Of a GPU's, in bytes: `allocated` and `reserved` by torch."""
    gauge_before: float
    """Products per second, in 10⁹ floating-point operations."""
    gauge_after: float

    @property
    def seconds(self) -> float:
        """From the first update's end to the last one's."""
        return self.ends[-1] - self.ends[0]

    @property
    def cpu_seconds(self) -> float:
        """Of its threads, from the first update's end to the last one's."""
        return self.cpu_ends[-1] - self.cpu_ends[0]


@dataclass(frozen=True)
class Failure:
    """Why a line of the table has no figures."""

    label: str
    why: str
    last_lines: str = ""
    """Of what it wrote."""

    def hits(self, turn: Turn) -> bool:
        """Whether this turn need not be tried any more."""
        return self.label in (turn.label, turn.side)

    def __str__(self) -> str:
        return f"{self.label} failed: {self.why}\n{self.last_lines}".rstrip()


def interpreter(side: str, arguments: argparse.Namespace) -> str:
    """The Python that runs a side."""
    known = SIDES[side]
    return str(getattr(arguments, known.needs)) if known.has_interpreter else sys.executable


def environment(side: str, arguments: argparse.Namespace) -> dict[str, str]:
    """Of a side's process: another tool sees this bench, but none of the kit's packages."""
    known = SIDES[side]
    paths = [str(SCRIPTS)]
    if not known.has_interpreter:
        paths += [str(arguments.trl)] if known.needs else []
        paths += [os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **QUIET,
        **({"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}),
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def run(turn: Turn, folder: Path, arguments: argparse.Namespace) -> Outcome | Failure:
    """One side, once, in a process of its own that is watched from here."""
    python = interpreter(turn.side, arguments)
    command = [python, "-m", "train_bench.child", turn.side, turn.recompute, str(folder)]
    (folder / "told.json").unlink(missing_ok=True)
    before = gauge(arguments.threads, arguments.device, arguments.precision)
    started = time.time()
    log = folder / f"{turn.side}.log"
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            env=environment(turn.side, arguments),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        peak = watched(child)
    why = fault_of(child.returncode, folder / "told.json", arguments.updates)
    if why is not None:
        return Failure(turn.label, why, last_lines(log))
    found = json.loads((folder / "told.json").read_text())
    return Outcome(
        label=turn.label,
        losses=found["losses"],
        ends=[end - started for end, _ in found["ends"]],
        cpu_ends=[cpu for _, cpu in found["ends"]],
        recomputes=found["recomputes"],
        versions=found["versions"],
        peak_bytes=peak,
        device_peaks=found["device"],
        gauge_before=before,
        gauge_after=gauge(arguments.threads, arguments.device, arguments.precision),
    )


def fault_of(code: int, told: Path, updates: int) -> str | None:
    """Why a process that has ended gives no figures; None where it does."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}."
    if code > 0:
        return f"exit code {code}."
    if not told.exists():
        return "it ended without its figures."
    ended = len(json.loads(told.read_text())["ends"])
    return f"it told the end of {ended} of {updates} updates." if ended != updates else None


def last_lines(log: Path) -> str:
    """The end of a log, and the end of each line where it is long."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(line[-_WIDEST:] for line in lines[-_LAST_LINES:])


def watched(child: subprocess.Popen[bytes]) -> int:
    """Wait for a process; returns the peak of its memory and its children's, in bytes."""
    peak, ended = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            try:
                own = psutil.Process(child.pid)
                others = own.children(recursive=True)
                total = own.memory_info().rss + sum(bytes_of_its_own(one) for one in others)
            except psutil.Error:
                continue
            peak = max(peak, total)

    thread = threading.Thread(target=sample)
    thread.start()
    child.wait()
    ended.set()
    thread.join()
    return peak


def bytes_of_its_own(process: psutil.Process) -> int:
    """Of a child: what was just forked shares its parent's memory, until it becomes the program
    that it was forked for, or writes.
    """
    if process.cmdline() != process.parent().cmdline():
        return int(process.memory_info().rss)
    is_young = time.time() - process.create_time() < _YOUNG_SECONDS
    return 0 if is_young else int(process.memory_full_info().uss)


def gauge(threads: int, device: str = "cpu", precision: str = "fp32") -> float:
    """10⁹ operations per second of products as a small model has them, or on a GPU one of 8B, for
    about a second.
    """
    import torch

    torch.set_num_threads(threads)
    rows, inner, outer = (512, 576, 1536) if device == "cpu" else (4096, 4096, 14336)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(outer, inner, device=device, dtype=dtype)
    rates = []
    ends = time.perf_counter() + 1.0
    while time.perf_counter() < ends:
        started = time.perf_counter()
        for _ in range(8):
            left @ right.T
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(8 * 2 * rows * inner * outer / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)
