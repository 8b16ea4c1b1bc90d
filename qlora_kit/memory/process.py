"""How much memory this process has, and has had at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch


def resident_bytes() -> int:
    """In memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most that was in memory at once since the process began, files mapped into it included.

    Linux counts it for the program (VmHWM); what `getrusage` says there may be the parent's, from
    before the program was started.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes() -> int | None:
    """The most that torch had on the GPU at once; None without one."""
    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
