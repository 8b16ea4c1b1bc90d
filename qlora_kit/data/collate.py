"""From sequences to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_kit.data.render import IGNORE_INDEX, TokenSequence


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest sequence of the batch, rounded up to a multiple."""

    pad_token_id: int
    multiple: int = 1

    def __call__(self, sequences: Sequence[TokenSequence]) -> dict[str, torch.Tensor | list[str]]:
        """Tensors of shape (batch, length), and `origins`, the rows they come from."""
        longest = max(len(sequence.input_ids) for sequence in sequences)
        length = -(-longest // self.multiple) * self.multiple
        return {
            "input_ids": self._pad([s.input_ids for s in sequences], length, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(s.input_ids) for s in sequences], length, 0),
            "labels": self._pad([s.labels for s in sequences], length, IGNORE_INDEX),
            "origins": [sequence.origin for sequence in sequences],
        }

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
