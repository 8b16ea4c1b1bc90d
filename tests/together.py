"""Runs of several processes that share one start-up: workers that train one recipe after another.

`Together` starts `python tests/together.py` once for each rank; each reads the names of files with
jobs from its standard input.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 400.0


@dataclass(frozen=True)
class Job:
    """One run: a recipe and what is overridden in it."""

    recipe: str
    overrides: tuple[str, ...] = ()
    short: tuple[int, int, int] | None = None
    """Rank, sequences, forward passes: on that rank, more than so many sequences at a time are too
    much for the memory, once so many passes have gone well.
    """
    failing: int = 0
    """The file operation of saving, counted from 1, at which the disk fails; 0: none."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment_of_launch() -> dict[str, str]:
    """Ours, with this package first, and one thread for each process."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


class Together:
    """As many processes as asked for, started when they are first needed, which takes longer than
    most runs.
    """

    def __init__(self, folder: Path, count: int):
        self.folder = folder
        self.count = count
        self._workers: list[subprocess.Popen[str]] = []
        self._number = 0

    def train(self, folder: Path, jobs: Sequence[Job]) -> list[list[str]]:
        """One after the other; what each raised, by job and rank.

        An empty text where nothing was. What was said is in said-0.txt, said-1.txt, … of `folder`.
        """
        self._workers = self._workers or [self._started(rank) for rank in range(self.count)]
        self._number += 1
        plan = folder / f"jobs-{self._number}.json"
        plan.write_text(json.dumps([{**asdict(job), "port": free_port()} for job in jobs]))
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{plan}\n")
            worker.stdin.flush()
        until = time.monotonic() + TIMEOUT_SECONDS
        answers = [answer_to(plan, rank) for rank in range(self.count)]
        while not all(one.exists() for one in answers):
            for rank, worker in enumerate(self._workers):
                assert worker.poll() is None, self._log(rank).read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        by_rank = [json.loads(one.read_text()) for one in answers]
        return [list(raised) for raised in zip(*by_rank, strict=True)]

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()

    def _log(self, rank: int) -> Path:
        return self.folder / f"worker-{rank}.txt"

    def _started(self, rank: int) -> subprocess.Popen[str]:
        count = self.count
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        numbers = {name: str(value) for name, value in ranks.items()}
        with self._log(rank).open("w") as log:
            return subprocess.Popen(
                [sys.executable, __file__],
                env={**environment_of_launch(), **numbers, "MASTER_ADDR": "127.0.0.1"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )


def answer_to(plan: Path, rank: int) -> Path:
    """Where a worker writes what its jobs have raised; it appears whole."""
    return plan.with_name(f"{plan.stem}-raised-{rank}.json")


@contextmanager
def short_of_memory(short: tuple[int, int, int] | None) -> Iterator[None]:
    """Forward passes that fail as an allocator lets them, where `Job.short` says so."""
    import torch
    from peft import PeftModelForCausalLM

    if short is None or os.environ["RANK"] != str(short[0]):
        yield
        return
    _, fits, after = short
    forward = PeftModelForCausalLM.forward
    passed = 0

    def limited(model: PeftModelForCausalLM, *args: Any, **inputs: Any) -> Any:
        nonlocal passed
        outputs = forward(model, *args, **inputs)
        if model.training:
            passed += 1
            # Examples of one row begin where positions do.
            rows = inputs.get("position_ids")
            num_sequences = len(inputs["input_ids"]) if rows is None else int((rows == 0).sum())
            if passed > after and num_sequences > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return outputs

    PeftModelForCausalLM.forward = limited  # type: ignore[method-assign]
    try:
        yield
    finally:
        PeftModelForCausalLM.forward = forward  # type: ignore[method-assign]


def work(plan: Path) -> None:
    """What one rank does."""
    import torch
    from accelerate.state import AcceleratorState
    from faulty_disk import FaultyDisk
    from rich.console import Console

    from qlora_kit.cli.console import ConsoleReporter
    from qlora_kit.errors import QloraKitError
    from qlora_kit.recipe import load_recipe
    from qlora_kit.run import run_recipe

    torch.set_num_threads(1)
    raised = []
    is_main = os.environ["RANK"] == "0"
    for number, job in enumerate(json.loads(plan.read_text())):
        os.environ["MASTER_PORT"] = str(job["port"])
        said = plan.with_name(f"said-{number}.txt") if is_main else Path(os.devnull)
        try:
            with said.open("w") as file, short_of_memory(job["short"]):
                reporter = ConsoleReporter(Console(file=file, width=132))
                disk = FaultyDisk(job["failing"], "I/O error")
                run_recipe(load_recipe(Path(job["recipe"]), job["overrides"]), reporter, disk=disk)
            raised.append("")
        except QloraKitError as error:
            raised.append(f"{'(told elsewhere) ' * error.is_told_elsewhere}{error}")
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    answer = answer_to(plan, int(os.environ["RANK"]))
    draft = answer.with_suffix(".draft")
    draft.write_text(json.dumps(raised))
    draft.rename(answer)


if __name__ == "__main__":
    from qlora_kit.environment import settle_upstream

    settle_upstream()
    for line in sys.stdin:
        work(Path(line.rstrip("\n")))
