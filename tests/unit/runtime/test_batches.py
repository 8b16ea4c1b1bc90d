"""Batches: every window is in one, and none is too large."""

from __future__ import annotations

import random

import pytest

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.runtime import batches as module
from qlora_kit.runtime.batches import batch_windows


def numbered(length: int) -> TokenSequence:
    ids = tuple(range(1000, 1000 + length))
    return TokenSequence(ids, ids, "row")


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
