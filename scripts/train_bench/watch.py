"""One run of one side in a process of its own, watched from here."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


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


def run(side: str, folder: Path, arguments: argparse.Namespace) -> Outcome:
    """One side, once, in a process of its own that is watched from here."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    if side == "trl" and arguments.trl is not None:
        paths = [str(arguments.trl), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    script = [sys.executable, sys.argv[0], "--side", side, "--folder", str(folder)]
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
