"""What training happens in, besides the model and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.checkpoint.disk import DISK, Disk
from qlora_kit.environment import Hardware
from qlora_kit.model.saved import AdapterFiles
from qlora_kit.processes import ALONE, Processes
from qlora_kit.report.reporter import Reporter
from qlora_kit.startup import UNTIMED, Laps
from qlora_kit.train.memory import MemoryWatch
from qlora_kit.train.requests import Requests

if TYPE_CHECKING:
    from qlora_kit.checkpoint.run_directory import RunDirectory


@dataclass(frozen=True)
class Surroundings:
    """What training happens in, besides the model and the data."""

    hardware: Hardware
    precision: str
    run: RunDirectory
    memory: MemoryWatch
    reporter: Reporter
    requests: Requests
    adapter_files: AdapterFiles
    """What a checkpoint holds of the adapter, besides the values of its weights."""
    keep_adapter: Callable[..., None]
    """Write the adapter into a folder that appears whole; of a sharded one, the given `weights`."""
    records: Mapping[str, str]
    """Further text files of a checkpoint, by name."""
    processes: Processes = ALONE
    disk: Disk = DISK
    laps: Laps = UNTIMED
