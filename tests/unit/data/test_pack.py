"""Packing: nothing lost, no bin too full, and the bins that best-fit decreasing makes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.pack import Bins, PackedSequence, PackedSequences, pack
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

CAPACITY = 24
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)
quick = settings(deadline=None, derandomize=True, max_examples=200)


def packed(lengths: list[int], capacity: int = CAPACITY) -> Bins:
    return pack(np.array(lengths, np.int64), capacity)


def fills(bins: Bins, lengths: list[int]) -> list[int]:
    return [sum(lengths[one] for one in bins[number]) for number in range(len(bins))]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """How full each bin is, by looking at every bin for every sequence."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, fill in enumerate(bins) if fill + length <= capacity]
        if fitting:
            bins[max(fitting, key=lambda number: bins[number])] += length
        else:
            bins.append(length)
    return sorted(bins)


@quick
@given(lengths=LENGTHS)
def test_nothing_is_lost_and_nothing_is_there_twice(lengths: list[int]) -> None:
    bins = packed(lengths)
    assert sorted(bins.members.tolist()) == list(range(len(lengths)))
    members = [int(one) for number in range(len(bins)) for one in bins[number]]
    assert members == bins.members.tolist()


@quick
@given(lengths=LENGTHS)
def test_no_bin_overflows_and_none_is_empty(lengths: list[int]) -> None:
    assert all(0 < fill <= CAPACITY for fill in fills(packed(lengths), lengths))


@quick
@given(lengths=LENGTHS, capacity=st.integers(CAPACITY, 3 * CAPACITY))
def test_the_bins_are_those_of_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """Bins that are equally full are interchangeable, so only how full they are is compared."""
    found = sorted(fills(packed(lengths, capacity), lengths))
    assert found == best_fit_decreasing(lengths, capacity)


@quick
@given(lengths=LENGTHS)
def test_the_order_is_that_of_the_longest(lengths: list[int]) -> None:
    bins = packed(lengths)
    assert bins.members.tolist() == packed(lengths).members.tolist()
    for number in range(len(bins)):
        within = [(-lengths[one], one) for one in bins[number]]
        assert within == sorted(within), "the longest first, then the earliest"
    firsts = [(-lengths[bins[number][0]], bins[number][0]) for number in range(len(bins))]
    assert firsts == sorted(firsts)


@quick
@given(lengths=st.lists(st.integers(1, CAPACITY), min_size=2, max_size=20, unique=True))
def test_the_order_of_the_input_does_not_matter(lengths: list[int]) -> None:
    def contents(given: list[int]) -> list[list[int]]:
        bins = packed(given)
        return [[given[one] for one in bins[number]] for number in range(len(bins))]

    assert contents(lengths) == contents(lengths[::-1])


def test_nothing_to_pack() -> None:
    assert len(packed([])) == 0


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 8, 9, 1023, 1024, 1025])
def test_every_capacity(capacity: int) -> None:
    """The tree over rooms has to have a leaf for each of them, up to a power of two and beyond."""
    lengths = [1 + number % capacity for number in range(2 * capacity + 3)]
    found = sorted(fills(packed(lengths, capacity), lengths))
    assert found == best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("length", [0, CAPACITY + 1])
def test_lengths_that_cannot_be_packed_are_our_bug(length: int) -> None:
    with pytest.raises(AssertionError):
        packed([3, length])


def test_it_packs_a_hundred_thousand_in_seconds() -> None:
    """Looking at every bin would take a thousand times as long."""
    lengths = np.random.default_rng(0).integers(1, 2048, 100_000)
    start = time.monotonic()
    bins = pack(lengths, 2048)
    assert time.monotonic() - start < 20
    assert lengths.sum() / (len(bins) * 2048) > 0.99


def sequence(length: int, number: int) -> TokenSequence:
    ids = tuple(range(100 * number, 100 * number + length))
    return TokenSequence(ids, (IGNORE_INDEX, *ids[1:]), f"rows:{number}")


def test_packed_sequences_hold_the_sequences_of_their_bins() -> None:
    lengths = [10, 20, 4, 3, 14, 24]
    sequences = [sequence(length, number) for number, length in enumerate(lengths)]
    bins = packed(lengths)
    view = PackedSequences(sequences, bins, np.array(lengths))
    assert view.lengths.tolist() == [one.num_tokens for one in view]
    assert len(view) == len(bins) == 4
    assert [one.origin for one in view[0].parts] == ["rows:5"]
    assert [one.origin for one in view[1].parts] == ["rows:1", "rows:2"]
    assert view[-1] == view[3]
    assert list(view[1:3]) == [view[1], view[2]]
    assert sum(one.num_tokens for one in view) == sum(lengths)
    assert sum(one.num_supervised for one in view) == sum(lengths) - len(lengths)
    with pytest.raises(IndexError):
        view[4]


def test_a_packed_sequence_counts_its_parts() -> None:
    both = PackedSequence((sequence(3, 1), sequence(5, 2)))
    assert (both.num_tokens, both.num_supervised) == (8, 6)
