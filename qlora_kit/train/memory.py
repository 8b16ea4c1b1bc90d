"""Memory from the start to the end of a run: by phase, per step, and whether it grows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.memory.process import resident_bytes

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware

_SAMPLE_SECONDS = 0.05
# Growth is judged once there are this many steps, over the second half of them.
_MIN_STEPS_FOR_SLOPE = 40


@dataclass
class MemoryWatch:
    """Samples the process's resident memory in the background, and the device's at each mark.

    Use as a context; `phase(name)` begins a new phase. All figures in bytes.
    """

    device: str = "cpu"
    host_peaks: dict[str, int] = field(default_factory=dict)
    device_peaks: dict[str, int] = field(default_factory=dict)
    host_at_start: int = 0
    """Before there is a model: interpreter and libraries, and what else a process holds."""
    host_at_steps: list[int] = field(default_factory=list)
    device_at_steps: list[int] = field(default_factory=list)
    _phase: str = "start"
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> MemoryWatch:
        self.host_at_start = self._note_host()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._note_device()

    def phase(self, name: str) -> None:
        """End the phase under way and begin another."""
        self._note_device()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._phase = name
        self._note_host()

    def step(self) -> tuple[int, int]:
        """Call after each optimizer step; returns (host bytes now, device bytes peak)."""
        now = self._note_host()
        self.host_at_steps.append(now)
        if self.device == "cuda":
            self.device_at_steps.append(torch.cuda.memory_allocated())
        return now, self._note_device()

    def growth_per_step(self) -> dict[str, float]:
        """Of `host` and `device` memory what grows steadily, in bytes per step."""
        watched = {"host": self.host_at_steps, "device": self.device_at_steps}
        slopes = {where: steady_slope(points) for where, points in watched.items()}
        return {where: slope for where, slope in slopes.items() if slope is not None}

    @property
    def peak(self) -> tuple[str, int]:
        """The phase with the highest peak, and the peak: of the device if there is one."""
        peaks = self.device_peaks if self.device == "cuda" else self.host_peaks
        phase = max(peaks, key=lambda name: peaks[name])
        return phase, peaks[phase]

    def as_dict(self) -> dict[str, object]:
        phase, peak = self.peak
        return {
            "peak_bytes": peak,
            "peak_phase": phase,
            "host_peak_bytes": self.host_peaks,
            "device_peak_bytes": self.device_peaks,
            "growth_bytes_per_step": self.growth_per_step(),
        }

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._note_host()

    def _note_host(self) -> int:
        now = resident_bytes()
        phase = self._phase
        self.host_peaks[phase] = max(now, self.host_peaks.get(phase, 0))
        return now

    def _note_device(self) -> int:
        if self.device != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated()
        self.device_peaks[self._phase] = max(peak, self.device_peaks.get(self._phase, 0))
        return peak


def steady_slope(points: Sequence[int]) -> float | None:
    """Least-squares slope over the second half of `points`, per point.

    None where there are too few points, or where they do not grow steadily: the slope must
    explain 80 % of their variance, and the rise must be more than 1 % of the whole.
    """
    if len(points) < _MIN_STEPS_FOR_SLOPE:
        return None
    points = points[len(points) // 2 :]
    count = len(points)
    mean_x, mean_y = (count - 1) / 2, sum(points) / count
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in enumerate(points))
    slope = covariance / sum((x - mean_x) ** 2 for x in range(count))
    spread = sum((y - mean_y) ** 2 for y in points)
    explained = slope * covariance / spread if spread else 0.0
    return slope if explained > 0.8 and slope * count > 0.01 * mean_y else None


def device_bytes(hardware: Hardware) -> int:
    """Memory of one device, in use or not; on a CPU of what the container may use."""
    if hardware.device_memory_bytes is not None:
        return hardware.device_memory_bytes
    return min(hardware.host_memory_bytes, cgroup_limit_bytes() or hardware.host_memory_bytes)


def cgroup_limit_bytes() -> int | None:
    """What the container may use, None where nothing limits it."""
    path = Path("/sys/fs/cgroup/memory.max")
    if path.is_file():
        text = path.read_text().strip()
        return int(text) if text.isdigit() else None
    return None
