"""The loss on held-out rows, per supervised token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.errors import HardwareError
from qlora_kit.out_of_memory import NO_LIMIT, MemoryLimit, first_line, free_memory, is_out_of_memory
from qlora_kit.processes import ALONE, Processes
from qlora_kit.train.loader import AnyCollator, Item, longest_of

if TYPE_CHECKING:
    from torch import nn


class GivenUp(Exception):
    """An evaluation that a signal has cut short; it is made again by who goes on."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass
class HeldOutLoss:
    """Measures the same rows again and again, in the same order, drawing no random number.

    The processes share the rows; a batch that does not fit the memory is halved, for good and for
    all of them.
    """

    items: Sequence[Item]
    collator: AnyCollator
    batch_size: int
    processes: Processes = ALONE
    limit: MemoryLimit = NO_LIMIT
    stop_signal: Callable[[], int | None] = lambda: None
    """Of a signal that has asked this process to stop, its number."""
    _reason: str = ""
    """Why the batch was halved, on this process."""

    def measure(self, model: nn.Module, warn: Callable[[str], None]) -> float:
        """Mean cross-entropy over all supervised tokens, in nats.

        Raises:
            HardwareError: on every process, where one row is too much for any.
            GivenUp: on every process, where a signal has asked any to stop.
        """
        self._give_up_where_asked()
        with _evaluating(model):
            total, count = self.processes.together(lambda: self._sums(model))
        self._agree(warn)
        self._give_up_where_asked()
        if self.processes.count > 1:
            sums = torch.tensor([total, float(count)], dtype=torch.float64, device=_device(model))
            torch.distributed.all_reduce(sums)
            total, count = float(sums[0]), int(sums[1])
        return total / max(count, 1)

    def try_longest(self, model: nn.Module, warn: Callable[[str], None]) -> None:
        """See that a batch of the longest rows fits, or halve it until it does."""

        def trial() -> None:
            while self._sum_of(model, longest_of(self.items, self.batch_size)) is None:
                pass

        with _evaluating(model):
            self.processes.together(trial)
        self._agree(warn)

    def _sums(self, model: nn.Module) -> tuple[float, int]:
        """Summed loss and number of supervised tokens of the rows of this process."""
        total, count, at = 0.0, 0, self.processes.rank
        while at < len(self.items) and not self.stop_signal():
            step = self.processes.count
            mine = [self.items[i] for i in range(at, len(self.items), step)[: self.batch_size]]
            loss = self._sum_of(model, mine)
            if loss is None:
                continue
            total, count = total + loss[0], count + loss[1]
            at += step * len(mine)
        return total, count

    def _sum_of(self, model: nn.Module, items: Sequence[Item]) -> tuple[float, int] | None:
        """Summed loss and number of supervised tokens; None where memory ran out, and the next
        batch will be smaller.
        """
        try:
            with self.limit.enforced():
                return loss_of(model, items, self.collator)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = first_line(error)
        free_memory(_device(model).type)
        if self.batch_size == 1:
            longest = max(item.num_tokens for item in items)
            raise HardwareError(
                f"out of memory while computing the held-out loss of one row of {longest:,} tokens "
                f"({self._reason}). Lower data.max_length, or leave train.eval_strategy: no."
            )
        self.batch_size = -(-self.batch_size // 2)
        return None

    def _give_up_where_asked(self) -> None:
        """A whole evaluation takes longer than who sends a signal waits before it kills."""
        asked = max(one or 0 for one in self.processes.gathered(self.stop_signal()))
        if asked:
            raise GivenUp(asked)

    def _agree(self, warn: Callable[[str], None]) -> None:
        """On the smallest batch of all processes."""
        told = self.processes.gathered((self.batch_size, self._reason))
        reason = next((one for _, one in told if one), "")
        self.batch_size, self._reason = min(size for size, _ in told), ""
        if reason:
            rows = f"{self.batch_size} row{'s' * (self.batch_size > 1)}"
            warn(
                f"out of memory in evaluation ({reason}); from here on {rows} at a time. The loss "
                "is over the same rows."
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, and after it as it was."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


def loss_of(model: nn.Module, items: Sequence[Item], collator: AnyCollator) -> tuple[float, int]:
    """Summed loss of some rows, and how many supervised tokens it is over."""
    batch = collator(items)
    device = _device(model)
    tensors = {
        name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    count = int((tensors["labels"][:, 1:] != IGNORE_INDEX).sum())
    if count == 0:
        return 0.0, 0
    with torch.no_grad():
        return float(model(**tensors, use_cache=False).loss) * count, count


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
