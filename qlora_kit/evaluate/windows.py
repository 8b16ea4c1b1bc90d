"""Long sequences as overlapping windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.runtime.batches import scored_positions


def split_windows(
    sequences: Iterable[TokenSequence],
    window_tokens: int | None = None,
    stride_tokens: int | None = None,
) -> list[TokenSequence]:
    """Cut every sequence into windows such that each supervised token is labelled in exactly one.

    A window repeats the end of the one before it as context, with no labels there: only the
    `stride_tokens` past the overlap count (the sliding window of the Hugging Face guide to
    perplexity). Where window and stride are equal they still share one token, as the first
    token of a window is predicted from nothing and would go unmeasured. None keeps sequences
    whole. Windows with nothing to measure are left out.
    """
    windows: list[TokenSequence] = []
    for sequence in sequences:
        windows += _split(sequence, window_tokens, stride_tokens)
    return [window for window in windows if window.num_supervised]


def _split(
    sequence: TokenSequence, window_tokens: int | None, stride_tokens: int | None
) -> list[TokenSequence]:
    length = len(sequence.input_ids)
    if window_tokens is None or length <= window_tokens:
        return [sequence]
    assert window_tokens > 1, "a window of one token predicts nothing"
    stride = min(stride_tokens or window_tokens // 2, window_tokens - 1)
    assert stride > 0
    windows = []
    measured = 0
    for start in range(0, length, stride):
        end = min(start + window_tokens, length)
        labels = (IGNORE_INDEX,) * (measured - start) + sequence.labels[measured:end]
        windows.append(TokenSequence(sequence.input_ids[start:end], labels, sequence.origin))
        measured = end
        if end == length:
            break
    return windows


def keep_first_tokens(windows: Sequence[TokenSequence], max_tokens: int) -> list[TokenSequence]:
    """The first windows, up to `max_tokens` supervised tokens; the last may lose some labels."""
    kept: list[TokenSequence] = []
    left = max_tokens
    for window in windows:
        if left <= 0:
            break
        positions = scored_positions(window)
        if len(positions) > left:
            end = positions[left]
            labels = window.labels[:end] + (IGNORE_INDEX,) * (len(window.labels) - end)
            window = TokenSequence(window.input_ids, labels, window.origin)
        left -= len(positions)
        kept.append(window)
    return kept
