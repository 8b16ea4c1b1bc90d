"""The memory watch: phases, peaks, and telling growth from noise."""

from __future__ import annotations

import mmap
import random

import pytest

from qlora_kit.train.memory import MemoryWatch, steady_slope

MIB = 1024**2


def test_each_phase_has_its_own_peak() -> None:
    """Of pages of its own: a heap may give again what tests before have left in it."""
    with MemoryWatch() as memory:
        memory.phase("small")
        memory.phase("large")
        with mmap.mmap(-1, 300 * MIB) as block:
            for place in range(0, 300 * MIB, 4096):
                block[place] = 1
            memory.step()
        memory.phase("after")
    assert 0 < memory.host_at_start <= memory.host_peaks["start"] < memory.host_peaks["large"]
    assert memory.host_peaks["large"] > memory.host_peaks["small"] + 250 * MIB
    assert memory.peak == ("large", memory.host_peaks["large"])
    assert memory.as_dict()["peak_phase"] == "large"


def test_steady_growth_is_seen_with_its_slope_on_host_and_device() -> None:
    memory = MemoryWatch()
    memory.host_at_steps = [1000 * MIB + 2 * MIB * step for step in range(100)]
    assert memory.growth_per_step() == {"host": pytest.approx(2 * MIB)}
    memory.device_at_steps = [500 * MIB + 3 * MIB * step for step in range(100)]
    assert memory.growth_per_step() == {
        "host": pytest.approx(2 * MIB),
        "device": pytest.approx(3 * MIB),
    }


def test_noise_a_warm_up_and_few_steps_are_no_growth() -> None:
    noise = random.Random(3)
    assert steady_slope([1000 * MIB + noise.randrange(20 * MIB) for _ in range(200)]) is None
    warm_up = [min(500 * MIB + 50 * MIB * step, 1000 * MIB) for step in range(100)]
    assert steady_slope(warm_up) is None
    assert steady_slope([1000 * MIB + 2 * MIB * step for step in range(10)]) is None
