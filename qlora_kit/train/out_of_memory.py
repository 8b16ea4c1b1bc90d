"""Memory that runs out: how it shows, how it is limited for a trial, and what would help."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MIB = 1024**2
# What allocators say besides torch.OutOfMemoryError: torch's on a CPU, bitsandbytes', cuBLAS'.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def first_line(error: BaseException) -> str:
    """Of what an error says; its class where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def free_memory(device: str) -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limited_memory(limit_mib: int | None, device: str) -> Iterator[None]:
    """Let allocations fail beyond a limit: the device's where there is one, else the process's.

    On a CPU the limit is on private writable memory (RLIMIT_DATA), which is what models, batches
    and activations are in.
    """
    if limit_mib is None:
        yield
        return
    if device == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_mib * _MIB / total, 1.0))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mib * _MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
