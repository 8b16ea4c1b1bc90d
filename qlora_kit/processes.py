"""The processes that a launcher started, and what they do one after the other or together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from qlora_kit.environment import launched
from qlora_kit.errors import QloraKitError

# Rank 0 may quantize a large base, or tokenize a large data set, while the others wait.
_PATIENCE = timedelta(hours=12)

T = TypeVar("T")


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

            torch.distributed.barrier()

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Done by the main process alone; every one gets what it returned.

        Raises:
            QloraKitError: on every process, where the main one met it.
        """
        if self.count == 1:
            return work()
        outcome: tuple[T | None, QloraKitError | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except QloraKitError as error:
                outcome = (None, error)
        value, fault = self.gathered(outcome)[0]
        if fault is not None:
            raise fault
        return value  # type: ignore[return-value]

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """One process of each machine goes first, the others find what it has left on the disk."""
        if not self.is_first_here:
            self.wait()
        try:
            yield
        finally:
            if self.is_first_here:
                self.wait()


ALONE = Processes()


def join(device: str) -> Processes:
    """Meet the other processes that a launcher (accelerate, torchrun, srun) started.

    Raises:
        HardwareError: more processes on this machine than GPUs.
    """
    rank, local_rank, count, count_here = launched()
    if count == 1:
        return ALONE
    from accelerate import PartialState

    PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Processes(rank, local_rank, count, count_here)


def leave(processes: Processes) -> None:
    """End the exchange; what follows is done by one process alone."""
    if processes.count == 1:
        return
    import torch.distributed

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
