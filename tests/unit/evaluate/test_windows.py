"""Windows and batches: every supervised token is measured once, and nothing is too large."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.evaluate import windows as module
from qlora_kit.evaluate.windows import (
    batch_windows,
    keep_first_tokens,
    scored_positions,
    split_windows,
)


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


def test_batches_hold_every_window_once_longest_first() -> None:
    windows = [numbered(length) for length in (3, 9, 5, 9, 2, 7)]
    batches = batch_windows(windows, 4, vocab_size=100)
    assert [[len(windows[i].input_ids) for i in batch] for batch in batches] == [
        [9, 9, 7, 5],
        [3, 2],
    ]
    assert sorted(i for batch in batches for i in batch) == list(range(6))


def test_batches_do_not_depend_on_order() -> None:
    windows = [
        TokenSequence((start, *range(length)), (IGNORE_INDEX, *range(length)), f"row {start}")
        for start in range(9)
        for length in (2, 7, 3)
    ]
    shuffled = random.Random(1).sample(windows, len(windows))

    def contents(given: list[TokenSequence]) -> list[list[TokenSequence]]:
        return [[given[i] for i in batch] for batch in batch_windows(given, 5, vocab_size=100)]

    assert contents(shuffled) == contents(windows)


def test_batches_shrink_for_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 1000 * 20)
    windows = [numbered(9) for _ in range(6)]
    assert [len(batch) for batch in batch_windows(windows, 4, vocab_size=1000)] == [2, 2, 2]
    assert [len(batch) for batch in batch_windows(windows, 4, vocab_size=9000)] == [1] * 6


def test_logits_that_cannot_be_left_out_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 1000 * 20)
    ids = tuple(range(10))
    windows = [TokenSequence(ids, (*[IGNORE_INDEX] * 9, 9), "row")] * 6
    assert [len(batch) for batch in batch_windows(windows, 6, 1000)] == [6]
    assert [len(batch) for batch in batch_windows(windows, 6, 1000, True)] == [2, 2, 2]


def test_batches_shrink_for_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 20)
    windows = [numbered(length) for length in (30, 10, 9, 8, 4, 4)]
    sizes = [[len(windows[i].input_ids) for i in b] for b in batch_windows(windows, 64, 100)]
    assert sizes == [[30], [10, 9], [8, 4], [4]]
