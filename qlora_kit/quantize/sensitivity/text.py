"""Rows to measure on: shuffled, and dealt out in sets that share none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.data.prepare import prepare_train
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.evaluate.windows import keep_first_tokens, split_windows
from qlora_kit.recipe import DataSpec, SourceSpec, load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
    window_tokens: int,
    split: str | None = None,
) -> Sequence[TokenSequence]:
    """The rows of a recipe's `data.train`, or of a file, rendered as they would be trained on.

    Plain text is cut into windows, every token of which counts; of conversations it is what the
    recipe's `data.loss_on` says, or what the assistant says.

    Raises:
        DataError: nothing can be read. RecipeError: the recipe has faults.
    """
    if Path(source).suffix in (".yaml", ".yml"):
        spec = load_recipe(Path(source)).data
    else:
        one = SourceSpec(path=source, split=split or "train")
        spec = DataSpec(train=(one,), max_length=window_tokens, overlength="truncate")
    return prepare_train(spec, tokenizer, stop_ids).sequences


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
        raise DataError(
            f"{num_sets} sets of {num_tokens} tokens are needed, and the rows have {available} "
            "supervised ones; name more rows, or set a smaller --num-tokens."
        )
    return dealt
