"""The batch that needs most, of the rows that there are or could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.plan.shape import Shape

if TYPE_CHECKING:
    from qlora_kit.data.prepare import Part
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.loader import Item


@dataclass(frozen=True)
class WorstBatch:
    """The longest sequences that are trained on together, the longest first."""

    items: tuple[tuple[int, ...], ...]
    """Of each sequence the tokens of what attention sees together."""
    supervised: tuple[int, ...]
    """Of each sequence."""
    description: str
    """Of how they become a batch, in a few words."""
    is_flat: bool = False
    """Whether all of them lie in one row."""
    is_masked: bool = False
    """Whether attention needs a mask for more than one of them."""
    is_always_masked: bool = False
    """Whether it does for one alone: of rows whose examples it is not given one by one."""
    by_example: bool = True
    """Whether it is given them one by one, where the model can have that."""

    @property
    def num_tokens(self) -> int:
        """Of all of them, padding included."""
        return sum(map(sum, self.items))

    def first(self, count: int) -> Shape:
        """Of as many sequences, taken together."""
        items = self.items[:count]
        rows = (tuple(length for item in items for length in item),) if self.is_flat else items
        is_masked = self.is_always_masked or (self.is_masked and len(items) > 1)
        return Shape(rows, sum(self.supervised[:count]), is_masked, self.by_example)


def worst_of(items: Sequence[Item], batches: Batching) -> WorstBatch:
    """Of sequences, as training would make a batch of them."""
    collator = batches.collator
    is_isolating, is_flat = isinstance(collator, IsolatingCollator), is_flattening(collator)
    lengths = {item.num_tokens for item in items}
    return WorstBatch(
        tuple(batches.attended(items)),
        tuple(item.num_supervised for item in items),
        batches.description,
        is_flat=is_flat,
        is_masked=not is_isolating and len(lengths) > 1,
        is_always_masked=is_isolating and not batches.by_example and not is_flat,
        by_example=batches.by_example,
    )


def is_flattening(collator: Collator | IsolatingCollator) -> bool:
    return isinstance(collator, IsolatingCollator) and collator.flatten


def worst_batch(recipe: Recipe, batches: Batching, is_possible: bool) -> WorstBatch:
    """Of the rows that there are, or of the longest that are possible."""
    num = recipe.train.per_device_train_batch_size
    if is_possible:
        return longest_possible(recipe, batches, num)
    return worst_of(batches.longest(num), batches)


def longest_possible(recipe: Recipe, batches: Batching, num: int) -> WorstBatch:
    """Of a batch in which no row could be longer, and all is supervised."""
    length = recipe.data.max_length
    worst = worst_of([TokenSequence((0,) * length, (0,) * length, "")] * num, batches)
    # Of rows of one length none is padded, but others will be.
    return replace(worst, is_masked=isinstance(batches.collator, Collator))


def train_rows(recipe: Recipe, vocabulary: Vocabulary) -> Part:
    """Reads and renders the training rows, as training does.

    Raises:
        DataError: there are none to train on.
    """
    from qlora_kit.data.prepare import prepare_train

    return prepare_train(recipe.data, vocabulary.tokenizer, vocabulary.stop_ids)
