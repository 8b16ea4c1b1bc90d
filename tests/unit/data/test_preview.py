"""Figures and pieces of a preview."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.preview import measure_lengths, measure_packing, spread

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, max_length=st.integers(8, 200))
def test_every_row_is_in_one_bin_and_max_length_parts_two(
    lengths: list[int], max_length: int
) -> None:
    found = measure_lengths(Counter(lengths), max_length)
    assert found is not None
    assert sum(one.count for one in found.bins) == found.num_rows == len(lengths)
    for one in found.bins:
        assert one.first <= one.last
        assert one.count == sum(one.first <= length <= one.last for length in lengths)
    for one, following in zip(found.bins, found.bins[1:], strict=False):
        assert following.first == one.last + 1
    beyond = sum(one.count for one in found.bins if one.first > max_length)
    assert beyond == found.num_longer == sum(length > max_length for length in lengths)
    assert found.longest == max(lengths)
    assert found.mean == pytest.approx(np.mean(lengths))
    for share, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        assert value == np.percentile(lengths, share, method="inverted_cdf")


def test_few_bins_however_far_the_longest_is() -> None:
    found = measure_lengths({**dict.fromkeys(range(30, 130), 99), 270_000: 1}, 1024)
    assert found is not None
    assert len(found.bins) <= 18
    assert found.bins[-1].count == 1
    assert found.bins[0].last - found.bins[0].first == 9


def test_no_rows_have_no_lengths() -> None:
    assert measure_lengths({}, 1024) is None


def test_packing_by_hand() -> None:
    """Batches of two: (1, 5) (5, 1) computes 20; packed into two of 6, 12."""
    found = measure_packing(np.array([1, 5, 5, 1]), 6, 2, "sequential", 0)
    assert (found.padded_tokens, found.num_batches) == (20, 2)
    assert (found.num_packed, found.packed_tokens, found.num_packed_batches) == (2, 12, 1)
    assert (found.num_sequences, found.num_tokens) == (4, 12)
    assert found.share_saved == pytest.approx(0.4)


def test_the_last_batch_is_only_as_large_as_it_is() -> None:
    found = measure_packing(np.array([3, 3, 3]), 3, 2, "sequential", 0)
    assert found.padded_tokens == 9


def test_grouping_by_length_pads_least() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    padded = {
        sampling: measure_packing(lengths, 128, 4, sampling, 1).padded_tokens
        for sampling in ("random", "sequential", "group_by_length")
    }
    assert padded["group_by_length"] < 0.8 * min(padded["random"], padded["sequential"])
    assert padded["random"] != measure_packing(lengths, 128, 4, "random", 2).padded_tokens


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, batch_size=st.integers(1, 9))
def test_no_way_computes_less_than_there_is(lengths: list[int], batch_size: int) -> None:
    found = measure_packing(np.array(lengths), 300, batch_size, "random", 7)
    assert found.padded_tokens >= found.num_tokens == sum(lengths)
    assert found.packed_tokens >= found.num_tokens
    assert found.num_packed <= len(lengths)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(10, 3, [0, 4, 9]), (2, 3, [0, 1]), (0, 3, []), (5, 0, []), (5, 1, [0])],
)
def test_examples_are_spread(total: int, count: int, expected: list[int]) -> None:
    assert spread(total, count) == expected
