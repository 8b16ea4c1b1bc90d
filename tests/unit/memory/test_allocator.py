"""What the C library keeps of freed blocks, and when it gives them back."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest

from qlora_kit.memory.allocator import holes_left_by, large_blocks_given_back

_MIB = 2**20
_TRIM_THRESHOLD, _THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
_LARGE = ("mallopt", _THRESHOLD, _MIB)
_USUAL = (
    ("mallopt", _THRESHOLD, 32 * _MIB),
    ("mallopt", _TRIM_THRESHOLD, 64 * _MIB),
    ("malloc_trim", 0),
)

_MEASURED = """
from qlora_kit.memory.allocator import large_blocks_given_back

MIB = 2**20

def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

def kept_mib():
    before = resident_mib()
    blocks, between = [], []
    for _ in range(24):
        blocks.append(b"x" * (4 * MIB))
        between.append(b"x" * (64 * 1024))  # keeps the heap from shrinking
    del blocks
    return resident_mib() - before

b"x" * (31 * MIB)  # from then on the library takes blocks of that size from its heap
for is_wanted in (False, True, False):
    with large_blocks_given_back(is_wanted):
        print(kept_mib())
"""

_FORWARD = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from qlora_kit.memory.live import LiveTensors

WIDTH, TOKENS, LAYERS = 256, 1024, 16

def resident_bytes():
    with open("/proc/self/statm") as sizes:
        return int(sizes.read().split()[1]) * 4096

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

layers = [Layer() for _ in range(LAYERS)]
torch.empty(31 * 2**20, dtype=torch.uint8)  # from then on blocks of that size are the heap's
hidden = torch.zeros(TOKENS, WIDTH)
layers[0](hidden).sum().backward()  # libraries take what they take once
before, live = resident_bytes(), LiveTensors()
with live:
    for one in layers:
        hidden = checkpoint(one, hidden, use_reentrant=False)
    print(live.gone_bytes, resident_bytes() - before - live.num_bytes)
"""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a GNU C library is asked for, none of which is done."""
    calls: list[tuple[object, ...]] = []
    library = SimpleNamespace(
        mallopt=lambda *given: calls.append(("mallopt", *given)),
        malloc_trim=lambda *given: calls.append(("malloc_trim", *given)),
    )
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return calls


def test_the_threshold_is_set_and_put_back(called: list[tuple[object, ...]]) -> None:
    with large_blocks_given_back(True):
        assert called == [_LARGE]
    assert called == [_LARGE, *_USUAL]


def test_it_is_put_back_where_training_ends_in_an_error(called: list[tuple[object, ...]]) -> None:
    with pytest.raises(MemoryError), large_blocks_given_back(True):
        raise MemoryError
    assert called == [_LARGE, *_USUAL]


def test_nothing_is_set_where_nobody_wants_it(called: list[tuple[object, ...]]) -> None:
    with large_blocks_given_back(False):
        pass
    assert called == []


def test_other_libraries_are_left_alone(
    called: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: object) -> NoReturn:
        pytest.fail("a library was opened")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with large_blocks_given_back(True):
        pass
    assert called == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_freed_blocks_go_back_to_the_system_while_it_lasts() -> None:
    """24 blocks of 4 MiB with something small between them, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED], capture_output=True, text=True, check=True
    )
    before, within, after = map(float, done.stdout.split())
    assert before > 80, "as the library is by itself"
    assert within < 10
    assert after > 80, "as it was before"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_a_forward_pass_leaves_about_as_large_holes_as_are_told() -> None:
    """Whose graph stays: 16 layers that keep nothing else, in a process of its own. How many holes
    there are is chance, within bounds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FORWARD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    passing, left = map(int, done.stdout.split())
    assert passing > 100 * _MIB
    assert 1 / 3 < holes_left_by(passing) / left < 3


def test_other_libraries_are_not_known_to_leave_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert holes_left_by(100 * _MIB) == 0
