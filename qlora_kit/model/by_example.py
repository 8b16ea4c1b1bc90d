"""Attention for rows of several examples: each by itself, in time and memory of its own square.

torch's SDPA is otherwise given a mask over the whole row, and computes what the mask then hides.
On a GPU all examples are one call of FlashAttention, where it passes a trial of its own.
Registered with transformers as an attention of its own, and switched on for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlora_kit.model import blockwise_attention, short_attention, variable_length
from qlora_kit.model.example_masks import ExampleMasks, masks_behind, placeholder_of

NAME = "sdpa_by_example"
_Lengths = tuple[tuple[int, ...], ...]


class _LastLengths:
    """Of the last positions asked for: all layers of a pass are given the same ones."""

    def __init__(self) -> None:
        self._of: weakref.ref[torch.Tensor] | None = None
        self._lengths: _Lengths = ()

    def of(self, positions: torch.Tensor) -> _Lengths:
        if self._of is None or self._of() is not positions:
            self.set(positions, example_lengths(positions))
        return self._lengths

    def set(self, positions: torch.Tensor, lengths: _Lengths) -> None:
        self._of, self._lengths = weakref.ref(positions), lengths


_last_lengths = _LastLengths()


class _Given:
    """The positions that a model's stack of layers was called with last, for layers that do not
    hand them on to their attention (GPTBigCode, Persimmon, Ministral 3). They hold until its next
    call, so that layers which recompute in the backward pass find those of their batch.
    """

    def __init__(self) -> None:
        self._positions: torch.Tensor | None = None
        self._is_kept = False

    @contextmanager
    def watched(self, model: PreTrainedModel) -> Iterator[None]:
        """Calls of the model's stack of layers within are noted."""

        def note(_: torch.nn.Module, __: Any, named: Mapping[str, Any]) -> None:
            if not self._is_kept:
                self._positions = named.get("position_ids")

        handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._positions = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Calls within are not noted."""
        self._is_kept = True
        try:
            yield
        finally:
            self._is_kept = False

    def positions_of(self, query: torch.Tensor) -> torch.Tensor | None:
        """(B, S), of queries (B, heads, S, D) of all that was given; None: they are of something
        else.
        """
        known = self._positions
        is_of_all = known is not None and known.ndim == 2 and known.shape[1] == query.shape[2]
        return known if is_of_all else None


_given = _Given()


def keeping_positions() -> AbstractContextManager[None]:
    """Where the model is called for its head alone, with a stand-in for the layers: they have
    passed already, and may recompute.
    """
    return _given.kept()


@dataclass
class Seen:
    """How attention has taken rows of several examples, by layers that it was called for."""

    in_one_call: int = 0
    one_by_one: int = 0


_seen = Seen()


@contextmanager
def watched_attention() -> Iterator[Seen]:
    """What is done within stands in the result afterwards."""
    before = Seen(_seen.in_one_call, _seen.one_by_one)
    found = Seen()
    yield found
    found.in_one_call = _seen.in_one_call - before.in_one_call
    found.one_by_one = _seen.one_by_one - before.one_by_one


def know_lengths(positions: torch.Tensor, lengths: _Lengths) -> None:
    """Of positions without numbers, which do not tell."""
    _last_lengths.set(positions, lengths)


def example_lengths(positions: torch.Tensor) -> _Lengths:
    """Tokens of each example of each row; one begins where positions (B, S) do not go on by 1."""
    found = []
    for row in positions.tolist():
        starts = [0, *(at for at in range(1, len(row)) if row[at] != row[at - 1] + 1), len(row)]
        found.append(tuple(end - start for start, end in pairwise(starts)))
    return tuple(found)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    is_blockwise: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' for SDPA: (B, heads, S, D) to (B, S, heads, D)."""
    lengths: _Lengths = ()
    masks = masks_behind(attention_mask)
    is_free = attention_mask is None or masks is not None
    if is_free and query.shape[2] == key.shape[2]:
        if position_ids is None:
            position_ids = _given.positions_of(query)
        if position_ids is not None:
            lengths = _last_lengths.of(position_ids)
        elif masks is not None:
            lengths = ((query.shape[2],),)
    if masks is None and max(map(len, lengths), default=1) == 1:
        given = (query, key, value, attention_mask)
        return _alone(module, *given, is_blockwise, **options), None
    lengths = lengths * (len(query) if len(lengths) == 1 else 1)
    places = [_places(row) for row in lengths]
    if _is_plain(options) and variable_length.covers(query, key, value):
        window = None if masks is None else _window_of(masks, places)
        if masks is None or (window is not None and variable_length.knows_windows()):
            is_causal = _is_causal(module, options) or masks is not None  # seen to be
            _seen.in_one_call += 1
            how = (options.get("scaling"), is_causal, window)
            return variable_length.attend(query, key, value, lengths, *how), None
    _seen.one_by_one += 1
    rows = []
    for number, row in enumerate(zip(*(one.split(1) for one in (query, key, value)), strict=True)):
        outputs = []
        parts = _split(row, lengths[number])
        for (start, length), (q, k, v) in zip(places[number], parts, strict=True):
            mask = None if masks is None else masks.of(number, start, length)
            outputs.append(_alone(module, q, k, v, mask, is_blockwise, **options))
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows) if len(rows) > 1 else rows[0], None


def _alone(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_blockwise: bool,
    **options: Any,
) -> torch.Tensor:
    """Of rows that are one example each."""
    if mask is None and _is_plain(options):
        is_causal, scale = _is_causal(module, options), options.get("scaling")
        if is_blockwise and is_causal and blockwise_attention.covers(query, key, value):
            return blockwise_attention.attend(query, key, value, scale)
        if short_attention.covers(query, key, value):
            return short_attention.attend(query, key, value, is_causal, scale)
    whole: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return whole


def _is_plain(options: Mapping[str, Any]) -> bool:
    """Whether nothing is drawn at random, and nothing added to the scores."""
    return not options.get("dropout") and options.get("position_bias") is None


def _is_causal(module: torch.nn.Module, options: Mapping[str, Any]) -> bool:
    """As transformers finds it where there is no mask."""
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def _places(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(where each example begins, how many tokens it has)"""
    return list(zip([0, *accumulate(lengths)], lengths, strict=False))


def _window_of(masks: ExampleMasks, places: Sequence[Sequence[tuple[int, int]]]) -> int | None:
    """Tokens that each token of every example sees; None: it is no such pattern."""
    is_window = masks.are_windows(
        (number, *one) for number, row in enumerate(places) for one in row
    )
    return masks.local_size if is_window else None


def _split(
    row: Sequence[torch.Tensor], lengths: tuple[int, ...]
) -> Iterator[Sequence[torch.Tensor]]:
    """The query, key and value of each example."""
    return zip(*(one.split(lengths, dim=2) for one in row), strict=True)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """None where each example sees all of itself that came before; else as for SDPA, or what
    stands for it where it can be made for each example.
    """
    is_plain = attention_mask is None and not use_vmap and q_length == kv_length
    if is_plain and local_size is None:
        return None
    if is_plain and local_size is not None and "mask_function" in options:
        # Also where all is near: a probe of short rows then shows whether the model hands it on.
        return placeholder_of(batch_size, q_length, local_size, options)
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **options,
    )
    return mask


def can_attend_by_example(model: torch.nn.Module) -> bool:
    """Whether the model computes with torch's SDPA, and lets its attention be chosen; none that
    attends in chunks (Llama 4), which would be counted from the beginning of the row.
    """
    return (
        isinstance(model, PreTrainedModel)
        and model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend
        and getattr(model.config.get_text_config(), "attention_chunk_size", None) is None
    )


def gains_by_example(
    model: torch.nn.Module, device: torch.device, compute_dtype: torch.dtype
) -> bool:
    """Whether a batch in one row may then be no slower than a padded one: on a CPU it is not, and
    on a GPU where the examples of a row are one call of a kernel, as a probe has to show.
    """
    if not can_attend_by_example(model):
        return False
    if device.type == "cpu":
        return True
    return may_be_one_call(model) and variable_length.is_suitable(device, compute_dtype)


def may_be_one_call(model: torch.nn.Module) -> bool:
    """Whether nothing in its configuration keeps the examples of a row from a GPU's kernel: heads
    whose values are of another width than their keys (DeepSeek's latent attention), or dropout.
    """
    config: Any = model.config
    text = config.get_text_config()
    of_values = getattr(text, "v_head_dim", None)
    of_keys = getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0)
    is_even = of_values is None or of_values == of_keys
    return is_even and not getattr(text, "attention_dropout", 0.0)


@contextmanager
def attending_by_example(
    model: PreTrainedModel, wanted: bool = True, is_blockwise: bool = False
) -> Iterator[None]:
    """The model's attention takes the examples of a row one by one, while the context lasts.

    Args:
        is_blockwise: whether those that `blockwise_attention` covers are computed by it.
    """
    if not wanted:
        yield
        return
    AttentionInterface.register(NAME, partial(_attention, is_blockwise=is_blockwise))
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    try:
        with _given.watched(model):
            yield
    finally:
        model.set_attn_implementation("sdpa")
