"""The shape of a batch, and tensors of it that hold no numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.model.by_example import know_lengths


@dataclass(frozen=True)
class Shape:
    """Of a batch."""

    rows: tuple[tuple[int, ...], ...]
    """Of its tensors, each as the tokens of what attention sees together."""
    num_supervised: int
    """Of all together."""
    is_masked: bool = False
    """Whether there is padding, or several examples in what attention sees, so that it needs a
    mask."""
    by_example: bool = True
    """Whether attention takes each example by itself, where a model can have that."""

    @property
    def num_tokens(self) -> int:
        """Of each row, padding included."""
        return max(map(sum, self.rows))

    @property
    def size(self) -> tuple[int, int]:
        return len(self.rows), self.num_tokens

    def as_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "supervised": self.num_supervised, "is_masked": self.is_masked}


def batch_of(shape: Shape, is_seen: bool) -> dict[str, torch.Tensor]:
    """Tensors of a batch: with positions that attention goes by, or with a mask."""
    batch = {name: torch.zeros(shape.size, dtype=torch.long) for name in ("input_ids", "labels")}
    other = torch.zeros(shape.size, dtype=torch.long)
    if is_seen:
        know_lengths(other, shape.rows)
    return {**batch, "position_ids" if is_seen else "attention_mask": other}
