"""Memory that runs out: how it shows, how it is limited for a trial, and what would help."""

from __future__ import annotations

import gc
import logging
import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from qlora_kit.errors import HardwareError
from qlora_kit.memory.process import resident_bytes

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


@dataclass(frozen=True)
class RanOut:
    """Memory that ran out."""

    reason: str
    num_tokens: int
    """Of the longest sequence at work."""


def ran_out(error: BaseException, num_tokens: int) -> RanOut:
    return RanOut(first_line(error), num_tokens)


def first_of(found: Iterable[RanOut | None]) -> RanOut | None:
    """What was found by the first process that found anything."""
    return next((one for one in found if one is not None), None)


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


@dataclass(frozen=True)
class MemoryLimit:
    """What a process may map for data (RLIMIT_DATA) while a model computes; None: no limit."""

    data_bytes: int | None = None

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Let allocations beyond the limit fail. Not for a whole run: a thread needs memory too."""
        if self.data_bytes is None:
            yield
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (self.data_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


NO_LIMIT = MemoryLimit()


@contextmanager
def limited_memory(limit_mib: int | None, device: str) -> Iterator[MemoryLimit]:
    """As if there were no more memory: of the device where there is one, else of the process.

    A GPU is limited within the block. On a CPU the yielded limit is to be enforced where the
    model computes: the process may then grow by what is missing to the limit.

    Raises:
        HardwareError: more than that is in use already.
    """
    if limit_mib is None:
        yield MemoryLimit()
        return
    if device == "cuda":
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit_mib * _MIB / total, 1.0))
        try:
            yield MemoryLimit()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    in_use = resident_bytes()
    if in_use > limit_mib * _MIB:
        raise HardwareError(
            f"train.max_memory_mib is {limit_mib:,}, and the base and the data alone take "
            f"{in_use / _MIB:,.0f} MiB; raise it."
        )
    # Much of what is mapped already is not in memory.
    yield MemoryLimit(_mapped_data_bytes() + limit_mib * _MIB - in_use)


def _mapped_data_bytes() -> int:
    """What RLIMIT_DATA counts, by the kernel's own count."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise HardwareError("train.max_memory_mib needs Linux where there is no GPU; remove it.")
