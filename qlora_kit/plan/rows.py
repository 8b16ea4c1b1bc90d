"""The batch that needs most, of the rows that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.data.collate import Batch, Collator
from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.plan.trial import Shape
from qlora_kit.train.loader import longest_of

if TYPE_CHECKING:
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe


def longest_there_is(recipe: Recipe, vocabulary: Vocabulary) -> Shape:
    """Reads and renders the training rows, as training does.

    Raises:
        DataError: there are none to train on.
    """
    from qlora_kit.data.prepare import prepare_train

    sequences = prepare_train(recipe.data, vocabulary.tokenizer, vocabulary.stop_ids).sequences
    size = recipe.train.per_device_train_batch_size
    if recipe.data.packing:
        places = size * recipe.data.max_length
        share = sum(one.num_supervised for one in sequences) / sum(
            one.num_tokens for one in sequences
        )
        return Shape(size, recipe.data.max_length, int(share * places), is_masked=True)
    pad = vocabulary.tokenizer.pad_token_id
    assert isinstance(pad, int)
    return shape_of(Collator(pad)(longest_of(sequences, size)))  # type: ignore[arg-type]


def shape_of(batch: Batch) -> Shape:
    """Of tensors as a collator makes them."""
    num_sequences, num_tokens = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    # Examples of one row see each other by no mask where attention takes them one by one.
    is_by_example = mask is None and "position_ids" in batch
    return Shape(
        num_sequences,
        num_tokens,
        int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()),
        is_masked=not is_by_example and (mask is None or not bool(mask.all())),
    )
