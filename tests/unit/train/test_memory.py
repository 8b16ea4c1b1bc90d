"""The memory watch: phases, peaks, and telling growth from noise."""

from __future__ import annotations

import random

from qlora_kit.train.memory import MemoryWatch

MIB = 1024**2


def test_each_phase_has_its_own_peak() -> None:
    with MemoryWatch() as memory:
        memory.phase("small")
        memory.phase("large")
        block = bytearray(300 * MIB)
        block[::4096] = b"x" * len(block[::4096])
        memory.step()
        del block
        memory.phase("after")
    assert memory.host_peaks["large"] > memory.host_peaks["small"] + 250 * MIB
    assert memory.peak == ("large", memory.host_peaks["large"])
    assert memory.as_dict()["peak_phase"] == "large"


def test_steady_growth_is_seen_with_its_slope() -> None:
    memory = MemoryWatch()
    memory.host_at_steps = [1000 * MIB + 2 * MIB * step for step in range(100)]
    slope = memory.growth_per_step()
    assert slope is not None
    assert abs(slope - 2 * MIB) < 0.01 * MIB


def test_noise_a_warm_up_and_few_steps_are_no_growth() -> None:
    memory = MemoryWatch()
    noise = random.Random(3)
    memory.host_at_steps = [1000 * MIB + noise.randrange(20 * MIB) for _ in range(200)]
    assert memory.growth_per_step() is None
    memory.host_at_steps = [min(500 * MIB + 50 * MIB * step, 1000 * MIB) for step in range(100)]
    assert memory.growth_per_step() is None
    memory.host_at_steps = [1000 * MIB + 2 * MIB * step for step in range(10)]
    assert memory.growth_per_step() is None
