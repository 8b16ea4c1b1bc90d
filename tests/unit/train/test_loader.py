"""Micro-batches of one process, and batches that are divided."""

from __future__ import annotations

import torch

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.train.loader import (
    BatchShape,
    MicroBatches,
    OrderedItems,
    collate,
    data_loader,
    divided,
    longest_of,
)
from qlora_kit.train.order import TrainOrder


def rows(count: int) -> list[TokenSequence]:
    made = []
    for number in range(count):
        ids = tuple(range(5, 9 + number))
        made.append(TokenSequence(ids, (IGNORE_INDEX, *ids[1:]), f"rows.jsonl:{number + 1}"))
    return made


def batches(count: int, shape: BatchShape, start: int = 0, end: int = 4) -> MicroBatches:
    order = TrainOrder(count, shape.items_per_update, "sequential", 0)
    return MicroBatches(OrderedItems(rows(count), order), Collator(0), shape, start, end)


def test_always_as_many_micro_batches_an_update() -> None:
    made = list(batches(5, BatchShape(2, 2)))
    assert [len(batch["items"]) for batch in made] == [2, 2, 1, 0] * 2
    assert [batch["num_tokens"] for batch in made][3] == 0
    assert set(made[3]["labels"].flatten().tolist()) == {IGNORE_INDEX}


def test_the_first_of_an_update_tells_all_its_rows() -> None:
    made = list(batches(5, BatchShape(1, 2, num_processes=2, rank=1), end=1))
    assert made[0]["origins"] == ["rows.jsonl:2"]
    assert made[0]["update_origins"] == [f"rows.jsonl:{number}" for number in (1, 2, 3, 4)]
    assert made[1]["update_origins"] == []


def test_it_begins_where_it_is_told() -> None:
    whole = [batch["origins"] for batch in batches(7, BatchShape(2, 1), end=6)]
    rest = [batch["origins"] for batch in batches(7, BatchShape(2, 1), start=4, end=6)]
    assert rest == whole[4:]


def test_loading_draws_no_random_number_of_the_global_generator() -> None:
    """A resumed run starts a loader more often than one that was not stopped."""
    before = torch.get_rng_state()
    assert len(list(data_loader(batches(5, BatchShape(2, 2)), pin_memory=False))) == 8
    assert torch.equal(torch.get_rng_state(), before)


def test_a_divided_batch_is_the_same_rows() -> None:
    batch = collate(rows(5), Collator(0))
    for parts in (1, 2, 3, 4, 8):
        pieces = divided(batch, parts, Collator(0))
        assert [origin for one in pieces for origin in one["origins"]] == batch["origins"]
        assert sum(one["num_tokens"] for one in pieces) == batch["num_tokens"]
        assert len(pieces) <= parts
    assert [len(one["items"]) for one in divided(batch, 8, Collator(0))] == [1] * 5


def test_a_flattened_batch_is_divided_between_its_examples() -> None:
    packed = [PackedSequence((row,)) for row in rows(4)]
    collator = IsolatingCollator(0, flatten=True)
    whole, pieces = collator(packed), divided(collate(packed, collator), 2, collator)
    joined = torch.cat([one["input_ids"] for one in pieces], dim=1)
    assert torch.equal(joined, whole["input_ids"])


def test_the_longest() -> None:
    assert [one.num_tokens for one in longest_of(rows(9), 3)] == [12, 11, 10]
    assert len(longest_of(rows(2), 3)) == 2
