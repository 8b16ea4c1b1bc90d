"""Attempts at `train` that are forked from a process which has imported everything already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended."""

    code: int
    out: str
    err: str


@dataclass
class Zygote:
    """The process that forks the attempts."""

    process: subprocess.Popen[str]

    def ask(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that forks the attempts has ended")
        return dict(json.loads(line))

    def run(self, order: dict[str, Any], kill_after: float | None = None) -> Attempt:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        number = self.ask()["process"]
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):
                os.kill(number, 9)
        code = self.ask()["code"]
        return Attempt(code, Path(order["out"]).read_text(), Path(order["err"]).read_text())


@contextmanager
def zygotes(count: int = 2, within: tuple[str, ...] = ()) -> Iterator[list[Zygote]]:
    """Each with another order of Python's sets, as every new process has; `within` is the begin of
    a command that runs another one.
    """
    with ExitStack() as held:
        started = []
        for number in range(count):
            environment = {
                **os.environ,
                "PYTHONHASHSEED": str(number + 1),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONPATH": os.pathsep.join(one for one in sys.path if one),
            }
            process = held.enter_context(
                subprocess.Popen(
                    [*within, sys.executable, "-m", "crash.zygote"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )
            started.append(Zygote(process))
        for one in started:
            one.ask()
        yield started
        for one in started:
            assert one.process.stdin is not None
            one.process.stdin.close()
