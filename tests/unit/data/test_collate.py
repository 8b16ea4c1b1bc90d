"""Padding: on the right, and nothing of it is trained on or looked at."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

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


def item(*parts: TokenSequence) -> PackedSequence:
    return PackedSequence(parts)


def test_examples_of_a_row_are_told_apart_by_their_positions() -> None:
    a, b, c = SEQUENCES
    batch = IsolatingCollator(pad_token_id=3)([item(c, a), item(b)])
    assert set(batch) == {"input_ids", "position_ids", "labels", "origins", "num_tokens"}
    assert batch["input_ids"].tolist() == [[9, 3, 4, 2, 1, 5, 6, 7], [8, 3, 3, 3, 3, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[*c.labels, *a.labels], [IGNORE_INDEX] * 8]
    assert batch["origins"] == ["b:1", "a:1", "a:2"]
    assert batch["num_tokens"] == 9
    for name in ("input_ids", "position_ids", "labels"):
        assert batch[name].dtype == torch.int64


def test_a_row_that_is_full_needs_no_filling() -> None:
    batch = IsolatingCollator(pad_token_id=3)([item(SEQUENCES[0]), item(SEQUENCES[0])])
    assert batch["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert batch["num_tokens"] == batch["input_ids"].numel()


def test_sequences_that_are_not_packed_are_rows_of_their_own() -> None:
    batch = IsolatingCollator(pad_token_id=3)(SEQUENCES)
    assert batch["input_ids"].tolist()[1] == [8, 3, 3, 3, 3]
    assert batch["position_ids"].tolist()[1] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("packed", [True, False])
def test_all_of_a_batch_in_one_row(packed: bool) -> None:
    a, b, c = SEQUENCES
    items = [item(a, b), item(c)] if packed else [a, b, c]
    batch = IsolatingCollator(pad_token_id=3, flatten=True)(items)
    assert batch["input_ids"].tolist() == [[*a.input_ids, *b.input_ids, *c.input_ids]]
    assert batch["labels"].tolist() == [[*a.labels, *b.labels, *c.labels]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    assert batch["num_tokens"] == 9


def test_no_example_is_trained_on_by_what_stands_before_it() -> None:
    """The loss shifts labels over a row, so the first label of each example has to be ignored."""
    batch = IsolatingCollator(pad_token_id=3)([item(*SEQUENCES)])
    starts = batch["position_ids"] == 0
    assert starts.sum() == 3
    assert (batch["labels"][starts] == IGNORE_INDEX).all()
