"""Long sequences as overlapping windows, and windows as batches that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

# Limits of one forward pass: its logits, of which a large vocabulary makes too many, and its
# tokens, padding included.
LOGITS_BYTES = 512 * 2**20
BATCH_TOKENS = 8192


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


def scored_positions(window: TokenSequence) -> list[int]:
    """Where the supervised tokens stand; the token at p is predicted by the logits at p - 1."""
    return [p for p, label in enumerate(window.labels) if p > 0 and label != IGNORE_INDEX]


def batch_windows(
    windows: Sequence[TokenSequence],
    batch_size: int,
    vocab_size: int,
    logits_everywhere: bool = False,
) -> list[list[int]]:
    """Indices of `windows`, batch by batch, longest first: a run short of memory fails at once.

    The order depends on what the windows hold, not on how they came, so results do not either.
    A batch has fewer than `batch_size` rows where they would exceed a limit above.
    `logits_everywhere` says that the model cannot leave out positions that are not measured.
    """

    def order(index: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        window = windows[index]
        return -len(window.input_ids), window.input_ids, window.labels

    max_cells = LOGITS_BYTES // (4 * vocab_size)
    batches: list[list[int]] = []
    columns: set[int] = set()
    longest = 0
    for index in sorted(range(len(windows)), key=order):
        window = windows[index]
        wanted = set(
            range(len(window.input_ids)) if logits_everywhere else scored_positions(window)
        )
        num_rows = len(batches[-1]) + 1 if batches else math.inf
        if (
            num_rows > batch_size
            or num_rows * longest > BATCH_TOKENS
            or num_rows * len(columns | wanted) > max_cells
        ):
            batches.append([])
            columns, longest = set(), len(window.input_ids)
        batches[-1].append(index)
        columns |= wanted
    return batches
