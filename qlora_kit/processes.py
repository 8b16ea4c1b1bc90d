"""The processes that a launcher started, and what they do one after the other or together.

A fault that one of them meets while the others wait is raised by all, so that none is left
waiting, and told by the main one alone. What they cannot agree on any more, because one of them
is gone, ends the others with ProcessLost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError

from qlora_kit.environment import Hardware, launched, require_whole_launch
from qlora_kit.errors import HardwareError, ProcessLost, QloraKitError
from qlora_kit.refusals import refusal_of

# Rank 0 may quantize a large base, or tokenize a large data set, while the others wait.
_PATIENCE = timedelta(hours=12)
# What gloo and NCCL say when the other end of a connection is gone.
_GONE = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "closed by peer")
# Those that speak up when another is gone: of the first two at most one is.
_SPEAKERS = (0, 1)

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What some work has made, or the fault that it met, the disk's among them."""

    value: T | None = None
    fault: QloraKitError | None = None


def _attempt(work: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(work())
    except QloraKitError as fault:
        return _Outcome(fault=fault)
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = refusal_of(error)
        if refusal is None:
            raise
        refusal.__cause__ = error
        return _Outcome(fault=refusal)


@dataclass(frozen=True)
class Processes:
    """How many train together, and which of them this one is."""

    rank: int = 0
    local_rank: int = 0
    """Within this machine; the number of the GPU it uses."""
    count: int = 1
    count_here: int = 1
    """On this machine."""

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        return self.local_rank == 0

    def wait(self) -> None:
        """Until all have come as far."""
        if self.count > 1:
            import torch.distributed

            with self.noticing_loss():
                torch.distributed.barrier()

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        with self.noticing_loss():
            torch.distributed.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Done by every process; `work` itself exchanges nothing with the others.

        Raises:
            QloraKitError: on every process, where any of them met it.
        """
        if self.count == 1:
            return work()
        return self._agreed(_attempt(work))

    def on_main(self, work: Callable[[], T]) -> T:
        """Done by the main process alone; every one gets what it returned.

        Raises:
            QloraKitError: on every process, where the main one met it.
        """
        if self.count == 1:
            return work()
        outcome = _attempt(work) if self.is_main else _Outcome[T]()
        fault, value = self.gathered((outcome.fault, outcome.value))[0]
        if fault is not None:
            raise self._shared(outcome.fault or fault)
        return value  # type: ignore[return-value]

    def first_here(self, work: Callable[[], T]) -> T:
        """Done by one process of each machine, then by the others, who find on the disk what it
        has left there.

        Raises:
            QloraKitError: on every process, where any of them met it.
        """
        if self.count == 1:
            return work()
        first = _attempt(work) if self.is_first_here else None
        self._agreed(first or _Outcome())
        return self._agreed(first or _attempt(work))

    def _agreed(self, outcome: _Outcome[T]) -> T:
        """What this process has made, unless another met a fault."""
        faults = [one for one in self.gathered(outcome.fault) if one is not None]
        if faults:
            raise self._shared(faults[0])
        return outcome.value  # type: ignore[return-value]

    def _shared(self, fault: QloraKitError) -> QloraKitError:
        fault.is_told_elsewhere = not self.is_main
        return fault

    @contextmanager
    def noticing_loss(self) -> Iterator[None]:
        """What an exchange raises where another process is gone becomes a ProcessLost.

        Raises:
            ProcessLost: it does.
        """
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not any(word in str(error) for word in _GONE):
                raise
            lost = ProcessLost(
                f"another of the {self.count} processes has ended, so this one ends as well."
            )
            lost.is_told_elsewhere = self.rank not in _SPEAKERS
            raise lost from error


ALONE = Processes()


def join(device: str) -> Processes:
    """Meet the other processes that a launcher (accelerate, torchrun, srun) started.

    Raises:
        HardwareError: more processes on this machine than GPUs.
        LaunchError: they cannot meet.
    """
    with same_everywhere():
        require_whole_launch()
    rank, local_rank, count, count_here = launched()
    if count == 1:
        return ALONE
    if device == "cuda":
        require_gpus(count_here)
    from accelerate import PartialState

    PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Processes(rank, local_rank, count, count_here)


def require_gpus(count_here: int) -> None:
    """Raises HardwareError where processes of one machine would have to share a GPU."""
    import torch

    there = torch.cuda.device_count()
    if count_here > there:
        raise HardwareError(
            f"{count_here} processes were launched on this machine, which has {there} "
            f"GPU{'s' * (there != 1)}; launch {there} (--nproc-per-node, --num_processes)."
        )


def common_hardware(machines: Sequence[Hardware]) -> Hardware:
    """What all processes of a run can do, so that all decide alike; the first where they differ.

    A timed probe may come out otherwise on the next process of the same machine.
    """
    first = machines[0]
    memory = [one.device_memory_bytes for one in machines if one.device_memory_bytes is not None]
    least = [one for one in machines if not one.native_bf16]
    return replace(
        first,
        device_memory_bytes=min(memory) if memory else None,
        host_memory_bytes=min(one.host_memory_bytes for one in machines),
        native_bf16=all(one.native_bf16 for one in machines),
        slow_bf16=all(one.has_bf16 for one in machines)
        and not all(one.native_bf16 for one in machines),
        native_fp16=all(one.native_fp16 for one in machines),
        native_tf32=all(one.native_tf32 for one in machines),
        reason=least[0].reason if least else first.reason,
    )


def leave(processes: Processes) -> None:
    """End the exchange; what follows is done by one process alone."""
    if processes.count == 1:
        return
    import torch.distributed

    processes.wait()
    torch.distributed.destroy_process_group()


@contextmanager
def same_everywhere() -> Iterator[None]:
    """For what every process finds out by itself before they meet: told once a machine."""
    try:
        yield
    except QloraKitError as fault:
        fault.is_told_elsewhere = launched()[1] > 0
        raise
