"""What the C library keeps of freed blocks, and when it gives them back."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest

from qlora_kit.memory.allocator import large_blocks_given_back

_MIB = 2**20
_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h
_LARGE, _USUAL = ("mallopt", _THRESHOLD, _MIB), ("mallopt", _THRESHOLD, 32 * _MIB)
_TRIM = ("malloc_trim", 0)

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
    assert called == [_LARGE, _USUAL, _TRIM]


def test_it_is_put_back_where_training_ends_in_an_error(called: list[tuple[object, ...]]) -> None:
    with pytest.raises(MemoryError), large_blocks_given_back(True):
        raise MemoryError
    assert called == [_LARGE, _USUAL, _TRIM]


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
