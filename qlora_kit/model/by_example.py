"""Attention for rows of several examples: each by itself, in time and memory of its own square.

torch's SDPA is otherwise given a mask over the whole row, and computes what the mask then hides.
Registered with transformers as an attention of its own, and switched on for a while.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' for SDPA: (B, heads, S, D) to (B, S, heads, D)."""
    lengths: _Lengths = ()
    if attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]:
        lengths = _last_lengths.of(position_ids)
    if max(map(len, lengths), default=1) == 1:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return whole
    lengths = lengths * (len(query) if len(lengths) == 1 else 1)
    rows = []
    for place, row in enumerate(zip(*(one.split(1) for one in (query, key, value)), strict=True)):
        parts = _split(row, lengths[place])
        outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in parts]
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows) if len(rows) > 1 else rows[0], None


def _split(
    row: Sequence[torch.Tensor], lengths: tuple[int, ...]
) -> Iterator[Sequence[torch.Tensor]]:
    """The query, key and value of each example."""
    return zip(*(one.split(lengths, dim=2) for one in row), strict=True)


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> torch.Tensor | None:
    """None where each example sees all of itself that came before; else as for SDPA."""
    is_plain = attention_mask is None and not use_vmap and q_length == kv_length
    if is_plain and (local_size is None or local_size >= q_length):
        return None
    mask: torch.Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **options,
    )
    return mask


def can_attend_by_example(model: torch.nn.Module) -> bool:
    """Whether the model computes with torch's SDPA, and lets its attention be chosen."""
    return (
        isinstance(model, PreTrainedModel)
        and model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend
    )


@contextmanager
def attending_by_example(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """The model's attention takes the examples of a row one by one, while the context lasts."""
    if not wanted:
        yield
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")
