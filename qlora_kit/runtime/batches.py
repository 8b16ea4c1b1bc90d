"""Windows as batches that fit in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

# Limits of one forward pass: its logits, of which a large vocabulary makes too many, and its
# tokens, padding included.
LOGITS_BYTES = 512 * 2**20
BATCH_TOKENS = 8192


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
