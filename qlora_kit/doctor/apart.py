"""Run probes in another process, so that even one that crashes the interpreter is survived."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a probe returned, or why it did not; `fault` is empty where it did."""

    value: Any
    fault: str


def run_apart(probes: Mapping[str, Callable[[], Any]]) -> dict[str, Outcome]:
    """Call every probe in one process of their own; whatever one raises is its outcome.

    A probe must be a function that can be imported. What it prints is dropped. One that takes
    the process down gives the next one a new process.
    """
    outcomes: dict[str, Outcome] = {}
    waiting = dict(probes)
    while waiting:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=_silence) as pool:
            for name in list(waiting):
                future = pool.submit(waiting.pop(name))
                error = future.exception()
                if error is None:
                    outcomes[name] = Outcome(future.result(), "")
                    continue
                if isinstance(error, BrokenProcessPool):
                    outcomes[name] = Outcome(None, "it crashed the process that it ran in")
                    break
                outcomes[name] = Outcome(None, _in_a_line(error))
    return outcomes


def _silence() -> None:
    """Upstream libraries print on import, to Python's streams and to the descriptors below."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _in_a_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
