"""Padding: on the right, and nothing of it is trained on or looked at."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.data.collate import Collator
from qlora_kit.data.render import IGNORE_INDEX, TokenSequence

SEQUENCES = [
    TokenSequence((5, 6, 7), (IGNORE_INDEX, IGNORE_INDEX, 7), "a:1"),
    TokenSequence((8,), (IGNORE_INDEX,), "a:2"),
    TokenSequence((9, 3, 4, 2, 1), (IGNORE_INDEX, 3, 4, 2, 1), "b:1"),
]


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (2, 6), (5, 5), (8, 8)])
def test_batches(multiple: int, length: int) -> None:
    batch = Collator(pad_token_id=3, multiple=multiple)(SEQUENCES)
    assert batch["origins"] == ["a:1", "a:2", "b:1"]
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[name].shape == (3, length)
        assert batch[name].dtype == torch.int64
    for row, sequence in enumerate(SEQUENCES):
        real = len(sequence.input_ids)
        assert batch["input_ids"][row].tolist() == [*sequence.input_ids, *[3] * (length - real)]
        assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (length - real)
        padding = [IGNORE_INDEX] * (length - real)
        assert batch["labels"][row].tolist() == [*sequence.labels, *padding]


def test_a_token_that_also_pads_counts_where_it_is_real() -> None:
    """The mask goes by position and not by id."""
    batch = Collator(pad_token_id=3)(SEQUENCES)
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 1, 1]
    assert batch["labels"][2].tolist() == [IGNORE_INDEX, 3, 4, 2, 1]
