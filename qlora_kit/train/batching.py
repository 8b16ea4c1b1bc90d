"""How sequences become batches: padded, packed, or without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit import kept
from qlora_kit.data.collate import Collator, IsolatingCollator
from qlora_kit.data.pack import PackedSequence, PackedSequences, pack
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.stream import StreamedSequences
from qlora_kit.model import variable_length
from qlora_kit.model.by_example import (
    attending_by_example,
    can_attend_by_example,
    gains_by_example,
    may_be_one_call,
    watched_attention,
)
from qlora_kit.train.facts import facts_of
from qlora_kit.train.isolation import Leakage, leaking, measure_leakage, told_of
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
    from transformers import PreTrainedModel

    from qlora_kit.data.prepare import Part
    from qlora_kit.environment import Hardware
    from qlora_kit.model.base import Base
    from qlora_kit.recipe import DataSpec, TrainSpec

_KIND = "isolation"  # in the cache
_NOT_TOLD = "the model does not tell its attention where examples end"
_NO_KERNEL = "no kernel takes the examples of a row in one call here"
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

    by_example: bool = False
    """Whether attention takes the examples of a row one by one."""

    @property
    def num_items(self) -> int:
        """Of one pass; 0 where a stream does not tell."""
        return 0 if isinstance(self.train, StreamedSequences) else len(self.train)

    def updates_per_pass(self, items_per_update: int) -> int:
        """0 where a stream does not tell."""
        return -(-self.num_items // items_per_update)

    def items(
        self, spec: TrainSpec, items_per_update: int, begin: dict[str, Any] | None = None
    ) -> Items:
        """What every update trains on, in the order that the recipe asks for.

        `begin` is where a stream stood when the checkpoint to go on from was written.
        """
        if isinstance(self.train, StreamedSequences):
            return StreamedItems(self.train, items_per_update, begin)
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

    def longest_by_itself(self, most: int) -> int:
        """Tokens of the longest example, of those with at most so many, where attention takes each
        by itself; 0: there is none. Of a stream, of those read beforehand.
        """
        if not self.by_example:
            return 0
        items = self.first if isinstance(self.train, StreamedSequences) else self.train
        packed = items if isinstance(items, PackedSequences) else None
        lengths = packed.example_lengths if packed is not None else lengths_of(items)
        return int(lengths[lengths <= most].max(initial=0))

    def attended(self, items: Sequence[Item]) -> list[tuple[int, ...]]:
        """Of each item of a batch, the tokens of what attention sees together: of its examples
        where they are taken one by one, else of the whole row, padding included.
        """
        longest = max(item.num_tokens for item in items)
        if isinstance(self.collator, IsolatingCollator) and (
            self.by_example or self.collator.flatten
        ):
            filled_to = 0 if self.collator.flatten else longest
            return [_examples(item, filled_to) for item in items]
        return [(longest,)] * len(items)


def _examples(item: Item, filled_to: int) -> tuple[int, ...]:
    parts = item.parts if isinstance(item, PackedSequence) else (item,)
    filling = filled_to - item.num_tokens
    lengths = tuple(part.num_tokens for part in parts)
    return (*lengths, filling) if filling > 0 else lengths


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
        probe = _probed(model, base, train.sequences, pad_token_id)
        leakage = probe.leakage
        if not leakage.is_isolated:
            raise leaking("data.packing", leakage)
        why = f"isolated from each other (probed: {leakage.difference:.1e} of the logits' range)"
        return _packing(train, held_out, spec, pad_token_id, probe.by_example, why)
    device = next(model.parameters()).device
    gains = gains_by_example(base.model, device, base.compute_dtype)
    if _leaves_padding_out(base.model, spec, gains):
        probe = _probed(model, base, train.sequences, pad_token_id)
        is_sdpa = _kernel(base.model) == "sdpa"
        pays = probe.by_example and (device.type == "cpu" or probe.in_one_call)
        if probe.leakage.is_isolated and (pays or spec.padding_free is True or not is_sdpa):
            how = (probe.by_example, probe.in_one_call)
            return _without_padding(base.model, train, held_out, pad_token_id, *how)
        if spec.padding_free is True:
            raise leaking("data.padding_free", probe.leakage)
        why = _NO_KERNEL if device.type != "cpu" else _NOT_TOLD
        why = why if probe.leakage.is_isolated else told_of(probe.leakage)
        return _padded(train, held_out, pad_token_id, why)
    return _padded(train, held_out, pad_token_id, _why_padded(base.model, spec))


def kernels_left() -> list[str]:
    """Those that should have worked here, and why they are not used; known once batches are
    planned.
    """
    kernel = "FlashAttention over the examples of a row"
    return [f"{kernel}: {why}" for why in variable_length.failures()]


def foreseen_batches(
    model: PreTrainedModel,
    train: Part,
    spec: DataSpec,
    pad_token_id: int,
    hardware: Hardware,
    compute_dtype: torch.dtype,
) -> Batching:
    """As `plan_batches` will decide where no example sees another and the kernel of a GPU works,
    which it proves and this takes for granted.
    """
    by_example = can_attend_by_example(model)
    is_suitable = variable_length.suits(hardware, compute_dtype) and may_be_one_call(model)
    gains = by_example and (hardware.device == "cpu" or is_suitable)
    if spec.packing:
        return _packing(train, (), spec, pad_token_id, by_example, "")
    if _leaves_padding_out(model, spec, gains):
        is_one_call = gains and hardware.device != "cpu"
        return _without_padding(model, train, (), pad_token_id, by_example, is_one_call)
    return _padded(train, (), pad_token_id, _why_padded(model, spec))


def _leaves_padding_out(model: PreTrainedModel, spec: DataSpec, gains: bool) -> bool:
    """Whether the recipe wants it so, or leaves it to us and attention does not pay for it."""
    if spec.padding_free != "auto":
        return spec.padding_free
    return _kernel(model) in _VARIABLE_LENGTH or gains


def _why_padded(model: PreTrainedModel, spec: DataSpec) -> str:
    """Where no probe is asked."""
    if spec.padding_free is False:
        return "data.padding_free: false"
    if can_attend_by_example(model):
        return _NO_KERNEL
    kind = model.config.model_type
    return f"the attention of {kind} ({_kernel(model)}) takes no examples one by one"


def _kernel(model: PreTrainedModel) -> str | None:
    found: str | None = getattr(model.config, "_attn_implementation", None)
    return found


def _packing(
    train: Part,
    held_out: Sequence[TokenSequence],
    spec: DataSpec,
    pad_token_id: int,
    by_example: bool,
    why: str,
) -> Batching:
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
        f"{what} of {spec.max_length} tokens, {why}",
        () if train.stream is None else _packed(train.sequences, spec.max_length),
        by_example,
    )


def _without_padding(
    model: PreTrainedModel,
    train: Part,
    held_out: Sequence[TokenSequence],
    pad_token_id: int,
    by_example: bool,
    is_one_call: bool,
) -> Batching:
    items = train.sequences if train.stream is None else train.stream
    collator = IsolatingCollator(pad_token_id, flatten=True)
    how = "each example by itself" if by_example else _kernel(model)
    if by_example and is_one_call:
        how = "each example by itself, in one call of torch's FlashAttention"
    what = f"without padding ({how})"
    return Batching(items, held_out, collator, what, train.sequences, by_example)


def _padded(
    train: Part, held_out: Sequence[TokenSequence], pad_token_id: int, why: str
) -> Batching:
    items = train.sequences if train.stream is None else train.stream
    what = f"padded to the longest of each: {why}"
    return Batching(items, held_out, Collator(pad_token_id), what, train.sequences)


@dataclass(frozen=True)
class _Probe:
    leakage: Leakage
    by_example: bool
    """Whether attention takes the examples of a row one by one."""
    in_one_call: bool
    """Of a kernel of a GPU, in every layer."""


def _probed(
    model: nn.Module, base: Base, sequences: Sequence[TokenSequence], pad_token_id: int
) -> _Probe:
    """What examples in one row see of each other, and how attention takes them; as an earlier start
    has found it on the same model, libraries and machine.
    """
    facts = facts_of(model)
    key = None if facts is None else kept.key_of({**facts, "dtype": str(base.compute_dtype)})
    known = None if key is None else kept.recall(_KIND, key)
    if known is not None:
        leakage = Leakage(known["difference"], known["limit"])
        return _Probe(leakage, known["by_example"], known["in_one_call"])
    probe = _measured(model, base, sequences, pad_token_id)
    if key is not None and probe.leakage.is_isolated and not variable_length.failures():
        how = {"by_example": probe.by_example, "in_one_call": probe.in_one_call}
        kept.keep(_KIND, key, {**asdict(probe.leakage), **how})
    return probe


def _measured(
    model: nn.Module, base: Base, sequences: Sequence[TokenSequence], pad_token_id: int
) -> _Probe:
    """One by one where attention can, unless the model does not tell it where they end."""
    probe = (model, sequences, pad_token_id, base.compute_dtype)
    if can_attend_by_example(base.model):
        with watched_attention() as seen:
            leakage = measure_leakage(*probe, lambda: attending_by_example(base.model))
        if leakage.is_isolated:
            in_one_call = seen.in_one_call > 0 and seen.one_by_one == 0
            return _Probe(leakage, True, in_one_call)
    return _Probe(measure_leakage(*probe), False, False)


def _packed(sequences: Sequence[TokenSequence], capacity: int) -> Sequence[PackedSequence]:
    lengths = lengths_of(sequences)
    return PackedSequences(sequences, pack(lengths, capacity), lengths)
