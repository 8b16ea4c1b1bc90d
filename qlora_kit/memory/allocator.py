"""The C library's heap, and what it keeps of tensors that are gone."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_kit.environment import heap_settings, with_heap_settings

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 2**20
# What the library itself comes to once blocks of that size were freed, at most; it then shrinks its
# heap where twice that is free at the end.
_USUAL_BYTES = 32 * 2**20
_NEVER = -1
_in_force: list[Mapping[int, int]] = []
# Of what a forward pass makes and lets go again; see `holes_left_by`.
_SHARE_LEFT = 0.43
_SHARE_LEFT_TIDY, _SHARE_LEFT_TIDY_RECOMPUTING = 0.27, 0.08
# No lists of small freed blocks that are not joined with their neighbours.
_TIDY = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
# Where the system gives pages of 2 MiB to who asks for them, which is what most are set to.
_LARGE_PAGES = {"glibc.malloc.hugetlb": "1"}
_GPU_DRIVER = Path("/dev/nvidiactl")


def begin_with_a_tidy_heap() -> None:
    """Let this process begin again, with the same command and number, and a C library that joins
    every block that is freed with its free neighbours at once, and asks the system for large pages
    (from glibc 2.35 on): only who starts a process can say that. Holes then are few
    (docs/memory.md, "Holes in the heap"), and the processor, which remembers where a few thousand
    pages lie, need not look that up all the time (docs/performance.md, "Large pages").

    Nothing is done with another library, where the environment says already what to do, where the
    command cannot be read twice, and on a machine with a GPU, on which what the host does in
    between is what counts. https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
    """
    if not _is_glibc() or heap_settings().keys() & _TIDY.keys() or _GPU_DRIVER.exists():
        return
    if sys.argv[0] == "-" or not sys.executable:
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    with suppress(OSError):
        said = heap_settings()
        asked = {name: value for name, value in _LARGE_PAGES.items() if name not in said}
        os.execve(sys.executable, command, with_heap_settings({**_TIDY, **asked}))


def is_tidy() -> bool:
    """Whether this process has begun so."""
    return _is_glibc() and heap_settings().items() >= _TIDY.items()


def is_of_the_heap(num_bytes: int) -> bool:
    """Whether a tensor of that size lies in the heap; the library gets larger ones by themselves,
    and gives them back at once.
    """
    return num_bytes < _USUAL_BYTES


def holes_left_by(passing_bytes: int, recomputing: float = 0.0) -> int:
    """Bytes that the heap keeps at the peak of a training step, and no tensor has.

    torch asks for blocks at multiples of 64 bytes. The GNU C library takes one that is 96 longer,
    and hands what it cuts off at either end to whoever asks for a few bytes next: in a forward
    pass mostly the graph that autograd keeps for the backward pass. A tensor that goes then leaves
    a hole as long as itself between two such crumbs, too short for the next tensor of its size,
    until the graph goes. In a tidy heap (`begin_with_a_tidy_heap`) most crumbs find back. How many
    are taken depends on every small thing that is asked for, so that the share is measured:
    docs/memory.md, "Holes in the heap".

    Args:
        passing_bytes: of tensors that the forward pass makes and lets go again (`is_of_the_heap`).
        recomputing: the share of the layers that does, whose holes the next ones fill.
    """
    if not _is_glibc():
        return 0
    if not is_tidy():
        return int(_SHARE_LEFT * passing_bytes)
    keeping = _SHARE_LEFT_TIDY * (1 - recomputing)
    return int((keeping + _SHARE_LEFT_TIDY_RECOMPUTING * recomputing) * passing_bytes)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


@contextmanager
def large_blocks_given_back(wanted: bool) -> Iterator[None]:
    """Blocks of a MiB and more go back to the system when they are freed, while the context lasts.

    The GNU C library keeps those of up to 32 MiB for the next ones, and holes between them: where
    layers recompute that can be as much as recomputing saves. It costs time, as every page that is
    given anew is cleared (a quarter to a half of a step on the machine that it was measured on).
    Other libraries are left as they are.
    """
    with _set({_M_MMAP_THRESHOLD: _LARGE_BYTES}, wanted):
        yield


@contextmanager
def freed_blocks_kept(wanted: bool) -> Iterator[None]:
    """The heap does not shrink, while the context lasts: what a backward pass lets go is there for
    the next forward pass, to which the system would otherwise give every page anew, cleared.

    Other libraries than the GNU C library are left as they are.
    """
    # Who says the one has said that the other is not to grow by itself any more.
    with _set({_M_MMAP_THRESHOLD: _USUAL_BYTES, _M_TRIM_THRESHOLD: _NEVER}, wanted):
        yield


@contextmanager
def _set(options: Mapping[int, int], wanted: bool) -> Iterator[None]:
    """With these, while the context lasts; behind it those of the contexts around it hold again."""
    if not wanted or not _is_glibc():
        yield
        return
    library = ctypes.CDLL(None)
    _in_force.append(options)
    for option, value in options.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        _in_force.pop()
        before = {_M_MMAP_THRESHOLD: _USUAL_BYTES, _M_TRIM_THRESHOLD: 2 * _USUAL_BYTES}
        for one in _in_force:
            before.update(one)
        for option, value in before.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
