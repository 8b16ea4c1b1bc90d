"""Rows to measure on: shuffled, and dealt out in sets that share none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.evaluate.windows import keep_first_tokens, split_windows
from qlora_kit.quantize.texts import find_texts, render_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_rows(source: str, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """Every row that `source` names: the training rows of a recipe, a file, wikitext2 or c4, or
    anything else that a recipe's source may be.

    Of plain text every token counts, of conversations what the assistant says, or what a recipe's
    `data.loss_on` says.

    Raises:
        DataError: nothing can be read. RecipeError: the recipe has faults.
    """
    found = render_texts(find_texts(source, "train"), tokenizer)
    return [row for rows in found.rows for row in rows]


def deal(
    rows: Sequence[TokenSequence], num_sets: int, num_tokens: int, window_tokens: int, seed: int
) -> list[list[TokenSequence]]:
    """Disjoint sets of `num_tokens` supervised tokens each, in random order.

    Raises:
        DataError: there are too few tokens; says how many there are.
    """
    windows = split_windows(rows, window_tokens, window_tokens)
    random.Random(seed).shuffle(windows)
    dealt: list[list[TokenSequence]] = []
    for _ in range(num_sets):
        taken = keep_first_tokens(windows, num_tokens)
        windows = windows[len(taken) :]
        dealt.append(taken)
    found = [sum(one.num_supervised for one in part) for part in dealt]
    if min(found) < num_tokens:
        available = sum(one.num_supervised for one in split_windows(rows, window_tokens))
        sets = "" if num_sets == 1 else f"{num_sets} sets of "
        raise DataError(
            f"{sets}{num_tokens:,} tokens are needed, and the rows have {available:,} "
            "supervised ones; name more rows, or set a smaller --num-tokens."
        )
    return dealt
