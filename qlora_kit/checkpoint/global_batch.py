"""How many sequences an update trains on where a run goes on, maybe with other processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

PROGRESS_FILE = "progress.json"  # of a checkpoint


@dataclass(frozen=True)
class GlobalBatch:
    """What an update of a run was, by a checkpoint of it."""

    items_per_update: int
    items_per_process: int
    """By the recipe: sequences at a time × accumulation."""
    num_processes: int

    def from_here_on(self, per_process: int, num_processes: int) -> int:
        """The same, unless the recipe now asks for another: neither what it says of one process
        is as before, nor what it says of all of them now.
        """
        asked = per_process * num_processes
        is_kept = per_process == self.items_per_process or asked == self.items_per_update
        return self.items_per_update if is_kept else asked


def batch_of(checkpoint: Path) -> GlobalBatch | None:
    """None where it does not say; whoever reads the rest of it refuses it then."""
    try:
        values = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
        return GlobalBatch(**{one.name: int(values[one.name]) for one in fields(GlobalBatch)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
