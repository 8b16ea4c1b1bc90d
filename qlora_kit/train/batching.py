"""How sequences become batches: padded, packed, or without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence, PackedSequences, pack
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.train.isolation import leaking, measure_leakage, require_isolation
from qlora_kit.train.loader import (
    Item,
    Items,
    OrderedItems,
    StreamedItems,
    lengths_of,
    longest_of,
)
from qlora_kit.train.order import TrainOrder

if TYPE_CHECKING:
    from torch import nn

    from qlora_kit.data.prepare import Part
    from qlora_kit.model.base import Base
    from qlora_kit.recipe import DataSpec, TrainSpec

# Kernels that are given where each example ends, and so do not pay for a row of many of them.
_VARIABLE_LENGTH = ("flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Batching:
    """What the trainer iterates over, and how it makes batches of it."""

    train: Sequence[Item] | StreamedSequences
    held_out: Sequence[Item]
    collator: Collator | IsolatingCollator
    description: str
    """In a few words, for people."""

    first: Sequence[Item] = ()
    """Of a stream, the items read beforehand."""

    @property
    def num_items(self) -> int:
        """Of one pass; 0 where a stream does not tell."""
        return 0 if isinstance(self.train, StreamedSequences) else len(self.train)

    def updates_per_pass(self, items_per_update: int) -> int:
        """0 where a stream does not tell."""
        return -(-self.num_items // items_per_update)

    def items(self, spec: TrainSpec, items_per_update: int) -> Items:
        """What every update trains on, in the order that the recipe asks for."""
        if isinstance(self.train, StreamedSequences):
            return StreamedItems(self.train, items_per_update)
        by_length = spec.train_sampling_strategy == "group_by_length"
        lengths = lengths_of(self.train).tolist() if by_length else ()
        order = TrainOrder(
            len(self.train), items_per_update, spec.train_sampling_strategy, spec.seed, lengths
        )
        return OrderedItems(self.train, order)

    def longest(self, count: int) -> list[Item]:
        """The longest items; of a stream, of those read beforehand."""
        return longest_of(
            self.first if isinstance(self.train, StreamedSequences) else self.train, count
        )


def plan_batches(
    model: nn.Module,
    base: Base,
    train: Part,
    held_out: Sequence[TokenSequence],
    spec: DataSpec,
) -> Batching:
    """Pack where the recipe says so; else leave the padding out where the attention kernel can.

    Raises:
        ModelError: packing or padding_free is asked for, and examples of one row see each other
            in this model.
    """
    pad_token_id = base.tokenizer.pad_token_id
    assert isinstance(pad_token_id, int)
    if spec.packing:
        leakage = require_isolation(model, train.sequences, pad_token_id, base.compute_dtype)
        packed: Sequence[Item] | StreamedSequences
        if train.stream is not None:
            packed, what = train.stream.packed(spec.max_length), "examples packed as they come"
        else:
            packed = _packed(train.sequences, spec.max_length)
            what = f"{len(train.sequences):,} examples packed into {len(packed):,} sequences"
        return Batching(
            packed,
            _packed(held_out, spec.max_length),
            IsolatingCollator(pad_token_id),
            f"{what} of {spec.max_length} tokens, isolated from each other (probed: "
            f"{leakage.difference:.1e} of the logits' range)",
            () if train.stream is None else _packed(train.sequences, spec.max_length),
        )
    items = train.sequences if train.stream is None else train.stream
    kernel = getattr(base.model.config, "_attn_implementation", None)
    wanted = kernel in _VARIABLE_LENGTH if spec.padding_free == "auto" else spec.padding_free
    if wanted:
        leakage = measure_leakage(model, train.sequences, pad_token_id, base.compute_dtype)
        if leakage.is_isolated:
            collator = IsolatingCollator(pad_token_id, flatten=True)
            what = f"without padding ({kernel})"
            return Batching(items, held_out, collator, what, train.sequences)
        if spec.padding_free is True:
            raise leaking("data.padding_free", leakage)
    what = "padded to the longest of each"
    return Batching(items, held_out, Collator(pad_token_id), what, train.sequences)


def _packed(sequences: Sequence[TokenSequence], capacity: int) -> Sequence[PackedSequence]:
    lengths = lengths_of(sequences)
    return PackedSequences(sequences, pack(lengths, capacity), lengths)
