"""The C library's heap, where it keeps what tensors have left."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 2**20
# What the library itself comes to once blocks of that size were freed, at most.
_USUAL_BYTES = 32 * 2**20


@contextmanager
def large_blocks_given_back(wanted: bool) -> Iterator[None]:
    """Blocks of a MiB and more go back to the system when they are freed, while the context lasts.

    The GNU C library keeps those of up to 32 MiB for the next ones, and holes between them: where
    layers recompute that can be as much as recomputing saves. It costs time, as every page that is
    given anew is cleared (a quarter to a half of a step on the machine that it was measured on).
    Other libraries are left as they are.
    """
    if not wanted or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    try:
        yield
    finally:
        library.mallopt(_M_MMAP_THRESHOLD, _USUAL_BYTES)
        library.malloc_trim(0)
