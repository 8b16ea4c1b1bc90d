"""What the C library keeps of freed blocks, and when it gives them back."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from qlora_kit.memory import allocator
from qlora_kit.memory.allocator import (
    begin_with_a_tidy_heap,
    freed_blocks_kept,
    holes_left_by,
    is_tidy,
    large_blocks_given_back,
)

_MIB = 2**20
_TRIM_THRESHOLD, _THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
_LARGE = ("mallopt", _THRESHOLD, _MIB)
_NEVER_TRIMMED = (("mallopt", _THRESHOLD, 32 * _MIB), ("mallopt", _TRIM_THRESHOLD, -1))
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
import ctypes
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from qlora_kit.memory.live import LiveTensors

WIDTH, TOKENS, LAYERS = 256, 1024, 16

class Heap(ctypes.Structure):  # struct mallinfo2 of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def free_bytes():
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Heap
    found = library.mallinfo2()
    return found.fordblks - found.keepcost

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

layers = [Layer() for _ in range(LAYERS)]

def forward():
    hidden = torch.zeros(TOKENS, WIDTH)
    for one in layers:
        hidden = checkpoint(one, hidden, use_reentrant=False)
    return hidden

torch.empty(31 * 2**20, dtype=torch.uint8)  # from then on blocks of that size are the heap's
forward().sum().backward()  # libraries take what they take once
live = LiveTensors()
with live:
    forward()
hidden = forward()
print(live.gone_bytes, free_bytes())
"""

_BEGINNING = """
import os, sys
from qlora_kit.memory.allocator import begin_with_a_tidy_heap, is_tidy

begin_with_a_tidy_heap()
print(os.getpid(), is_tidy(), sys.argv[1:], os.environ["GLIBC_TUNABLES"])
"""
_TIDY = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_LARGE_PAGES = "glibc.malloc.hugetlb=1"


_STEPS = """
import resource
from qlora_kit.memory.allocator import freed_blocks_kept, large_blocks_given_back

MIB = 2**20

def pages_given():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [b"x" * (4 * MIB) for _ in range(600)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with large_blocks_given_back(True):
    pass  # sets the usual thresholds, by which the heap shrinks
for is_wanted in (False, True, False):
    with freed_blocks_kept(is_wanted):
        print(pages_given())
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
    with large_blocks_given_back(False), freed_blocks_kept(False):
        pass
    assert called == []


def test_the_heap_shrinks_again_where_training_ends_in_an_error(
    called: list[tuple[object, ...]],
) -> None:
    with pytest.raises(MemoryError), freed_blocks_kept(True):
        raise MemoryError
    assert called == [*_NEVER_TRIMMED, *_USUAL]


def test_behind_one_the_other_holds_again(called: list[tuple[object, ...]]) -> None:
    with large_blocks_given_back(True):
        with freed_blocks_kept(True):
            pass
        assert called[: len(_NEVER_TRIMMED) + 1] == [_LARGE, *_NEVER_TRIMMED]
        assert set(called[len(_NEVER_TRIMMED) + 1 :]) == {_LARGE, *_USUAL[1:]}
        called.clear()
    assert called == [*_USUAL]


def test_other_libraries_are_left_alone(
    called: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: object) -> NoReturn:
        pytest.fail("a library was opened")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with large_blocks_given_back(True), freed_blocks_kept(True):
        pass
    assert called == []


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_kept_blocks_are_given_once() -> None:
    """2.3 GiB at a time, three times, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _STEPS], capture_output=True, text=True, timeout=120, check=True
    )
    before, kept, after = map(int, done.stdout.split())
    assert kept < before / 2
    assert kept < after / 2


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
@pytest.mark.parametrize(
    "tunables",
    ["", _TIDY, f"{_TIDY}:{_LARGE_PAGES}"],
    ids=["as it is", "tidy", "tidy, of large pages"],
)
def test_a_forward_pass_leaves_about_as_large_holes_as_are_told(
    monkeypatch: pytest.MonkeyPatch, tunables: str
) -> None:
    """Whose graph stays: 16 layers that keep nothing else, in a process of its own. How many holes
    there are is chance, within bounds.
    """
    if int(platform.libc_ver()[1].split(".")[1]) < 33:
        pytest.skip("a library that does not tell what is free")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FORWARD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    passing, left = map(int, done.stdout.split())
    assert passing > 100 * _MIB
    assert 1 / 3 < holes_left_by(passing) / left < 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the GNU C library")
def test_a_process_begins_again_with_its_command_and_number(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_BEGINNING)
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=7"}
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", program, "a b", "--c"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, _ = started.communicate()
    tunables = f"glibc.malloc.perturb=7:{_TIDY}:{_LARGE_PAGES}"
    assert said == f"{started.pid} True ['a b', '--c'] {tunables}\n"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[object, ...]]:
    """Processes that this one has become, which it does not."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    monkeypatch.setattr(allocator, "_GPU_DRIVER", tmp_path / "none")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return calls


def test_a_process_begins_again_once(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]]
) -> None:
    begin_with_a_tidy_heap()
    ((program, command, environment),) = begun
    assert program == sys.executable
    assert isinstance(command, list)
    assert command[1:] == sys.orig_argv[1:]
    assert isinstance(environment, dict)
    assert not is_tidy()
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    assert is_tidy()
    begin_with_a_tidy_heap()
    assert len(begun) == 1


def test_what_a_user_says_of_the_heap_holds(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]]
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=3")
    begin_with_a_tidy_heap()
    assert not begun
    assert not is_tidy()


def test_what_a_user_says_of_large_pages_holds(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]]
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    begin_with_a_tidy_heap()
    ((_, _, environment),) = begun
    assert isinstance(environment, dict)
    assert environment["GLIBC_TUNABLES"] == f"glibc.malloc.hugetlb=0:{_TIDY}"


def test_a_program_that_was_read_from_standard_input_cannot_begin_again(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-", "train"])
    begin_with_a_tidy_heap()
    assert not begun


def test_beside_a_gpu_the_heap_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]], tmp_path: Path
) -> None:
    monkeypatch.setattr(allocator, "_GPU_DRIVER", tmp_path)
    begin_with_a_tidy_heap()
    assert not begun


def test_a_system_that_refuses_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, begun: list[tuple[object, ...]]
) -> None:
    def refusing(*_: object) -> NoReturn:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "execve", refusing)
    begin_with_a_tidy_heap()


def test_other_libraries_are_not_known_to_leave_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert holes_left_by(100 * _MIB) == 0
