"""The loss on held-out rows, per supervised token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.errors import HardwareError
from qlora_kit.out_of_memory import NO_LIMIT, MemoryLimit, first_line, free_memory, is_out_of_memory
from qlora_kit.train.loader import AnyCollator, Item, longest_of

if TYPE_CHECKING:
    from torch import nn


@dataclass
class HeldOutLoss:
    """Measures the same rows again and again, in the same order, drawing no random number.

    The processes share the rows; a batch that does not fit the memory is halved, for good.
    """

    items: Sequence[Item]
    collator: AnyCollator
    batch_size: int
    rank: int = 0
    num_processes: int = 1
    limit: MemoryLimit = NO_LIMIT

    def measure(self, model: nn.Module, warn: Callable[[str], None]) -> float:
        """Mean cross-entropy over all supervised tokens, in nats."""
        was_training = model.training
        model.eval()
        total, count, at = 0.0, 0, self.rank
        while at < len(self.items):
            step = self.num_processes
            mine = [self.items[i] for i in range(at, len(self.items), step)[: self.batch_size]]
            loss = self._sum_of(model, mine, warn)
            if loss is None:
                continue
            total, count = total + loss[0], count + loss[1]
            at += step * len(mine)
        model.train(was_training)
        if self.num_processes > 1:
            sums = torch.tensor([total, float(count)], dtype=torch.float64, device=_device(model))
            torch.distributed.all_reduce(sums)
            total, count = float(sums[0]), int(sums[1])
        return total / max(count, 1)

    def try_longest(self, model: nn.Module, warn: Callable[[str], None]) -> None:
        """See that a batch of the longest rows fits, or halve it until it does."""
        was_training = model.training
        model.eval()
        while self._sum_of(model, longest_of(self.items, self.batch_size), warn) is None:
            pass
        model.train(was_training)

    def _sum_of(
        self, model: nn.Module, items: Sequence[Item], warn: Callable[[str], None]
    ) -> tuple[float, int] | None:
        """Summed loss and number of supervised tokens; None where memory ran out, and the next
        batch will be smaller.
        """
        try:
            with self.limit.enforced():
                return loss_of(model, items, self.collator)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)
        free_memory(_device(model).type)
        if self.batch_size == 1:
            longest = max(item.num_tokens for item in items)
            raise HardwareError(
                f"out of memory while computing the held-out loss of one row of {longest:,} tokens "
                f"({reason}). Lower data.max_length, or leave train.eval_strategy: no."
            )
        self.batch_size = -(-self.batch_size // 2)
        warn(
            f"out of memory in evaluation ({reason}); from here on {self.batch_size} rows at a "
            "time. The loss is over the same rows."
        )
        return None


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
