"""Which sequences an update trains on, however many processes share it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.train.order import TrainOrder, micro_batches

SIZES = st.integers(1, 60)
STRATEGIES = st.sampled_from(["random", "sequential", "group_by_length"])


@given(
    SIZES, SIZES, st.sampled_from(["random", "sequential", "group_by_length"]), st.integers(0, 9)
)
def test_every_pass_trains_on_every_item_once(
    num_items: int, per_update: int, strategy: str, seed: int
) -> None:
    lengths = [1 + (7 * number) % 13 for number in range(num_items)]
    order = TrainOrder(num_items, per_update, strategy, seed, lengths)  # type: ignore[arg-type]
    for number in range(3):
        first = number * order.updates_per_pass
        updates = [order.items_of(first + step) for step in range(order.updates_per_pass)]
        assert sorted(item for items in updates for item in items) == list(range(num_items))
        assert all(len(items) == per_update for items in updates[:-1])
        assert updates[-1]


def test_the_order_is_that_of_torch_by_seed_and_pass() -> None:
    order = TrainOrder(10, 4, "random", 42)
    for number in range(2):
        random = torch.Generator().manual_seed(42 + number)
        expected = torch.randperm(10, generator=random).tolist()
        found = [item for step in range(3) for item in order.items_of(3 * number + step)]
        assert found == expected


def test_an_update_far_ahead_is_gone_to_directly() -> None:
    """As quickly as the first: one permutation, and not all those before it."""
    order = TrainOrder(1_000, 8, "random", 1)
    assert order.items_of(10**9) == order.items_of(10**9)
    assert order.items_of(10**9) != order.items_of(10**9 + order.updates_per_pass)


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 200))
def test_processes_share_an_update_without_loss(
    per_device: int, accumulation: int, num_processes: int, num_items: int
) -> None:
    items = list(range(min(num_items, per_device * accumulation * num_processes)))
    shares = [
        list(micro_batches(items, per_device, accumulation, rank, num_processes))
        for rank in range(num_processes)
    ]
    assert sorted(item for share in shares for batch in share for item in batch) == items
    assert {len(share) for share in shares} == {accumulation}
    assert all(len(batch) <= per_device for share in shares for batch in share)


def test_the_same_update_for_any_number_of_processes() -> None:
    """1 × 8, 2 × 4 and 8 × 1 see the same sets at the same update."""
    order = TrainOrder(50, 16, "random", 3)
    for update in range(8):
        items = order.items_of(update)
        seen = []
        for num_processes, accumulation in ((1, 8), (2, 4), (8, 1)):
            batches = [
                batch
                for rank in range(num_processes)
                for batch in micro_batches(items, 2, accumulation, rank, num_processes)
            ]
            seen.append({batch for batch in batches if batch})
        assert seen[0] == seen[1] == seen[2]
