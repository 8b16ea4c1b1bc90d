"""What the trainer leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from qlora_kit.out_of_memory import MemoryLimit, RanOut


@dataclass(frozen=True)
class Hooks:
    """What the trainer leaves to others."""

    can_save: Callable[[], bool]
    """Whether a checkpoint can be put back exactly."""
    save: Callable[[], None]
    """Write a checkpoint of the update just made."""
    save_last: Callable[[], None]
    """The same, unless there is none to save, or it is saved already."""
    settle: Callable[[], None]
    """Wait until checkpoints are on the disk."""
    settled: Callable[[], AbstractContextManager[None]]
    """The same however the block ends, and whatever hinders it."""
    has_failed: Callable[[], bool]
    """Whether something is known to have hindered the one being written, by this process."""
    keep_last_good: Callable[[int], str]
    """Keep the adapter as it was after an update; returns where, for people."""
    warn: Callable[[str], None]
    gathered: Callable[[Any], list[Any]]
    """A value of every process."""
    limit: MemoryLimit
    """Enforced while the model computes."""
    out_of_memory: Callable[[RanOut, int], str]
    """What would help when so many sequences at a time are too much and cannot be fewer."""
