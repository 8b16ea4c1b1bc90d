"""From sequences to batches: padded, or isolated from each other without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

Batch = dict[str, Any]
NOT_FOR_THE_MODEL = ("origins", "num_tokens", "items", "update_origins")


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest sequence of the batch, rounded up to a multiple."""

    pad_token_id: int
    multiple: int = 1

    def __call__(self, sequences: Sequence[TokenSequence]) -> Batch:
        """Tensors of shape (batch, length), `origins`, the rows they come from, and `num_tokens`
        without padding.
        """
        longest = max(len(sequence.input_ids) for sequence in sequences)
        length = -(-longest // self.multiple) * self.multiple
        return {
            "input_ids": _padded([s.input_ids for s in sequences], length, self.pad_token_id),
            "attention_mask": _padded([[1] * len(s.input_ids) for s in sequences], length, 0),
            "labels": _padded([s.labels for s in sequences], length, IGNORE_INDEX),
            "origins": [sequence.origin for sequence in sequences],
            "num_tokens": sum(len(sequence.input_ids) for sequence in sequences),
        }


@dataclass(frozen=True)
class IsolatingCollator:
    """Several examples in a row of the batch, told apart by positions that start again at 0.

    There is no attention mask: transformers derives one from the positions, and only where no
    other is given. What fills a row up is an example of its own, and supervises nothing.
    """

    pad_token_id: int
    flatten: bool = False
    """Put all of a batch into one row, so that nothing has to be filled up."""

    def __call__(self, items: Sequence[PackedSequence | TokenSequence]) -> Batch:
        """As `Collator` gives, with `position_ids`; of shape (1, length) when flattened."""
        rows = [item.parts if isinstance(item, PackedSequence) else (item,) for item in items]
        if self.flatten:
            rows = [tuple(part for row in rows for part in row)]
        length = max(sum(len(part.input_ids) for part in row) for row in rows)
        ids = [[token for part in row for token in part.input_ids] for row in rows]
        labels = [[label for part in row for label in part.labels] for row in rows]
        positions = [
            [position for part in row for position in range(len(part.input_ids))] for row in rows
        ]
        for row in positions:
            row.extend(range(length - len(row)))
        return {
            "input_ids": _padded(ids, length, self.pad_token_id),
            "position_ids": torch.tensor(positions),
            "labels": _padded(labels, length, IGNORE_INDEX),
            "origins": [part.origin for row in rows for part in row],
            "num_tokens": sum(len(row) for row in ids),
        }


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
