"""Windows: every supervised token is measured once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.evaluate.windows import keep_first_tokens, split_windows
from qlora_kit.runtime.batches import scored_positions


def numbered(length: int, origin: str = "row") -> TokenSequence:
    """Token i is 1000 + i, so a label tells where it came from."""
    ids = tuple(range(1000, 1000 + length))
    return TokenSequence(ids, ids, origin)


def measured(windows: list[TokenSequence]) -> list[int]:
    return sorted(w.labels[p] - 1000 for w in windows for p in scored_positions(w))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 20))
def test_every_token_but_the_first_is_measured_once(length: int, window: int, stride: int) -> None:
    windows = split_windows([numbered(length)], window, min(stride, window))
    assert measured(windows) == list(range(1, length))
    for one in windows:
        assert len(one.input_ids) <= window
        pairs = zip(one.input_ids, one.labels, strict=True)
        assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
        assert one.origin == "row"


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 19))
def test_context_is_that_of_the_sliding_window_guide(length: int, window: int, stride: int) -> None:
    """The guide: begin at each multiple of the stride; a token counts where it first appears."""
    stride = min(stride, window - 1)
    expected = {}
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        for token in range(begin, end):
            expected.setdefault(token, begin)
        if end == length:
            break
    for one in split_windows([numbered(length)], window, stride):
        for place in scored_positions(one):
            assert expected[one.labels[place] - 1000] == one.input_ids[0] - 1000


def test_stride_defaults_to_half_the_window() -> None:
    starts = [w.input_ids[0] - 1000 for w in split_windows([numbered(20)], 8)]
    assert starts == [0, 4, 8, 12]


def test_short_sequences_and_no_window_stay_whole() -> None:
    row = numbered(10)
    assert split_windows([row], 10, 5) == [row]
    assert split_windows([row]) == [row]


def test_windows_with_nothing_to_measure_are_left_out() -> None:
    ids = tuple(range(1000, 1020))
    only_first = TokenSequence(ids, (ids[0], *[IGNORE_INDEX] * 19), "row")
    only_last = TokenSequence(ids, (*[IGNORE_INDEX] * 19, ids[19]), "row")
    assert split_windows([only_first], 8, 4) == []
    assert [w.input_ids[0] - 1000 for w in split_windows([only_last], 8, 4)] == [12]


@pytest.mark.parametrize("cap", [1, 8, 9, 10, 17, 100])
def test_cap_keeps_the_first_tokens(cap: int) -> None:
    windows = split_windows([numbered(10, "a"), numbered(10, "b")])
    kept = keep_first_tokens(windows, cap)
    assert sum(w.num_supervised for w in kept) == min(cap, 18)
    assert [w.num_supervised for w in kept] == (
        [min(cap, 9)] if cap <= 9 else [9, min(cap, 18) - 9]
    )
    assert all(len(w.input_ids) == 10 for w in kept)
