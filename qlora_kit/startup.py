"""Where the time goes between the command and the first update."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STARTUP_FILE = "startup.json"  # of a run
COLUMNS = ("start", "seconds", "CPU seconds", "share")
_STAT = Path("/proc/self/stat")
_START_FIELD = 19  # of those that follow the name, in ticks since the machine was started


@dataclass
class Item:
    """One part of a start."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of all threads, which other work on the machine lengthens little."""


class Laps:
    """Notes nothing: for whoever loads or trains without asking how long the start took."""

    def lap(self, name: str) -> None:
        """What was done since the last call is part of `name`."""

    def end(self, folder: Path) -> None:
        """The start is over; later laps are no part of it. What it took is kept in `folder`."""


UNTIMED = Laps()


class Startup(Laps):
    """Gives every moment since this process was started to one part, so that the parts add up."""

    def __init__(self, told: Callable[[Startup], None] = lambda _: None) -> None:
        """`told` is called with this at the end."""
        self._told = told
        self.items: list[Item] = []
        self.is_over = False
        self._last = time.monotonic() - process_seconds()
        self._last_cpu = 0.0

    def lap(self, name: str) -> None:
        if self.is_over:
            return
        now, cpu = time.monotonic(), time.process_time()
        item = next((one for one in self.items if one.name == name), None)
        if item is None:
            item = Item(name, 0.0, 0.0)
            self.items.append(item)
        item.seconds += now - self._last
        item.cpu_seconds += cpu - self._last_cpu
        self._last, self._last_cpu = now, cpu

    def end(self, folder: Path) -> None:
        if self.is_over:
            return
        self.is_over = True
        text = json.dumps(self.as_dict(), indent=2) + "\n"
        (folder / STARTUP_FILE).write_text(text, encoding="utf-8")
        self._told(self)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.items)

    @property
    def cpu_seconds(self) -> float:
        return sum(one.cpu_seconds for one in self.items)

    def as_dict(self) -> dict[str, Any]:
        """What `startup.json` of a run holds."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "items": [asdict(one) for one in self.items],
        }

    def rows(self) -> Sequence[tuple[str, str, str, str]]:
        """Name, seconds, CPU seconds and share of each part, and of the whole."""
        whole = Item("from the command to the first update", self.seconds, self.cpu_seconds)
        return [
            (
                one.name,
                f"{one.seconds:.2f}",
                f"{one.cpu_seconds:.2f}",
                f"{one.seconds / max(self.seconds, 1e-9):.0%}",
            )
            for one in (*self.items, whole)
        ]


def process_seconds() -> float:
    """Since this process was started: by the kernel's clock, to 10 ms, or else to a second."""
    if _STAT.exists():
        ticks = int(_STAT.read_text().rpartition(")")[2].split()[_START_FIELD])
        started = ticks / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)
    import psutil

    return max(time.time() - psutil.Process().create_time(), 0.0)
