"""What a side tells of its run: losses, clock, and whether it recomputed. Read by every process."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "trl",
    "liger-kernel",
    "unsloth",
    "llamafactory",
    "axolotl",
    "torchtune",
)


def moment() -> tuple[float, float]:
    """The time, and the CPU seconds of this process and of children that have ended, so far; on a
    GPU when its queue is empty.
    """
    if is_on_a_gpu():
        import torch

        torch.cuda.synchronize()
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return time.time(), own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def is_on_a_gpu() -> bool:
    """Whether this process has computed on one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def device_peaks() -> dict[str, int]:
    """Bytes that torch's allocator had given out and had reserved, at most; empty on a CPU."""
    if not is_on_a_gpu():
        return {}
    import torch

    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated": allocated, "reserved": reserved}


@dataclass
class Told:
    """What a side tells when it has ended."""

    losses: list[float] = field(default_factory=list)
    """Of each update, at full precision."""
    ends: list[tuple[float, float]] = field(default_factory=list)
    """Of each update: the time, and the CPU seconds so far."""
    recomputes: str = ""
    """What the side did about activations, in a word or two."""


def trainer_clock(told: Told) -> Any:
    """A callback of transformers' Trainer that fills in what is told."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            told.ends.append(moment())
            told.recomputes = "all" if model.is_gradient_checkpointing else "none"

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                told.losses.append(logs["loss"])

    return Clock()


def versions() -> dict[str, str]:
    """Of the libraries that this interpreter has, by their metadata."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
