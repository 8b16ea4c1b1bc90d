"""Memory that runs out: how it shows, how it is limited for a trial, and what would help."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from qlora_kit.errors import HardwareError

T = TypeVar("T")

_logger = logging.getLogger(__name__)
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


def in_batches_that_fit(
    batches: Iterable[Sequence[int]], work: Callable[[Sequence[int]], T], device: str
) -> Iterator[tuple[Sequence[int], T]]:
    """What `work` makes of each batch of indices, in order; where memory runs out, of halves of it,
    and of no more than so many at a time from then on.

    Raises:
        HardwareError: a single index is too much.
    """
    most: int | None = None
    for batch in batches:
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            if most is not None and len(part) > most:
                waiting += [part[most:], part[:most]]
                continue
            try:
                result = work(part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                yield part, result
                continue
            free_memory(device)
            if len(part) == 1:
                raise HardwareError(
                    f"out of memory while evaluating one row at a time ({reason}). Lower "
                    "data.max_length or evaluate.window_tokens, or evaluate on another machine."
                )
            most = -(-len(part) // 2)
            waiting.append(part)
            _logger.warning(
                "out of memory in evaluation (%s); from here on %d rows at a time", reason, most
            )


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
