"""Runs of several processes that share one start-up: a worker that trains one recipe after another.

Started by `train_together` as `python tests/together.py RUNS.json`, once for each rank.
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


def train_together(folder: Path, count: int, jobs: Sequence[Job]) -> list[list[str]]:
    """Train one after the other in `count` processes; what each raised, by job and rank.

    An empty text where nothing was. What was said is in said-0.txt, said-1.txt, … of `folder`.
    """
    plan = folder / "jobs.json"
    plan.write_text(json.dumps([{**asdict(job), "port": free_port()} for job in jobs]))
    workers = []
    for rank in range(count):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        numbers = {name: str(value) for name, value in ranks.items()}
        workers.append(
            subprocess.Popen(
                [sys.executable, __file__, str(plan)],
                env={**environment_of_launch(), **numbers, "MASTER_ADDR": "127.0.0.1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    until = time.monotonic() + TIMEOUT_SECONDS
    said = [worker.communicate(timeout=max(until - time.monotonic(), 1)) for worker in workers]
    for worker, (_, err) in zip(workers, said, strict=True):
        assert worker.returncode == 0, err
    by_rank = [json.loads(out.splitlines()[-1]) for out, _ in said]
    return [list(raised) for raised in zip(*by_rank, strict=True)]


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
            if passed > after and len(inputs["input_ids"]) > fits:
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
    from rich.console import Console

    from qlora_kit.cli.console import ConsoleReporter
    from qlora_kit.environment import quiet_upstream
    from qlora_kit.errors import QloraKitError
    from qlora_kit.recipe import load_recipe
    from qlora_kit.run import run_recipe

    quiet_upstream()
    torch.set_num_threads(1)
    raised = []
    is_main = os.environ["RANK"] == "0"
    for number, job in enumerate(json.loads(plan.read_text())):
        os.environ["MASTER_PORT"] = str(job["port"])
        said = plan.with_name(f"said-{number}.txt") if is_main else Path(os.devnull)
        try:
            with said.open("w") as file, short_of_memory(job["short"]):
                reporter = ConsoleReporter(Console(file=file, width=132))
                run_recipe(load_recipe(Path(job["recipe"]), job["overrides"]), reporter)
            raised.append("")
        except QloraKitError as error:
            raised.append(f"{'(told elsewhere) ' * error.is_told_elsewhere}{error}")
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    print(json.dumps(raised))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
