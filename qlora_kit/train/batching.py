"""How sequences become batches: padded, packed, or without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence, PackedSequences, pack
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.store import StoredSequences
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.train.isolation import measure_leakage, require_isolation

if TYPE_CHECKING:
    from torch import nn

    from qlora_kit.data.prepare import Part
    from qlora_kit.model.base import Base
    from qlora_kit.recipe import DataSpec

# Kernels that are given where each example ends, and so do not pay for a row of many of them.
_VARIABLE_LENGTH = ("flash_attention_2", "flash_attention_3", "flex_attention")

Item = TokenSequence | PackedSequence


@dataclass(frozen=True)
class Batching:
    """What the trainer iterates over, and how it makes batches of it."""

    train: Sequence[Item] | StreamedSequences
    held_out: Sequence[Item]
    collator: Collator | IsolatingCollator
    description: str
    """In a few words, for people."""

    @property
    def num_items(self) -> int:
        """Of one pass; 0 where a stream does not tell."""
        return 0 if isinstance(self.train, StreamedSequences) else len(self.train)


def plan_batches(
    model: nn.Module,
    base: Base,
    train: Part,
    held_out: Sequence[TokenSequence],
    spec: DataSpec,
) -> Batching:
    """Pack where the recipe says so; else leave the padding out where the attention kernel can.

    Raises:
        ModelError: packing is asked for, and packed examples see each other in this model.
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
        )
    items = train.sequences if train.stream is None else train.stream
    kernel = getattr(base.model.config, "_attn_implementation", None)
    if kernel in _VARIABLE_LENGTH:
        leakage = measure_leakage(model, train.sequences, pad_token_id, base.compute_dtype)
        if leakage.is_isolated:
            collator = IsolatingCollator(pad_token_id, flatten=True)
            return Batching(items, held_out, collator, f"without padding ({kernel})")
    return Batching(items, held_out, Collator(pad_token_id), "padded to the longest of each")


def _packed(sequences: Sequence[TokenSequence], capacity: int) -> Sequence[PackedSequence]:
    if isinstance(sequences, StoredSequences):
        lengths = sequences.lengths
    else:
        lengths = np.fromiter((one.num_tokens for one in sequences), np.int64, len(sequences))
    return PackedSequences(sequences, pack(lengths, capacity))
