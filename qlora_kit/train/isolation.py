"""Proof that packed examples do not see each other in the user's own model."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qlora_kit.data.collate import IsolatingCollator
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

_PROBE_TOKENS = 48
# Packed and alone differ by rounding; a neighbour that is seen moves the logits by far more.
_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass(frozen=True)
class Leakage:
    """What packing changes: the largest difference of a logit, as a share of the logits' range."""

    difference: float
    limit: float

    @property
    def is_isolated(self) -> bool:
        return self.difference <= self.limit


def measure_leakage(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    pad_token_id: int,
    compute_dtype: torch.dtype,
    attending: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Leakage:
    """Logits of examples packed behind another against those of each alone.

    Two rows are packed, the shorter of which is filled up, so that filling is probed too.

    Args:
        attending: how the packed ones are computed; those alone as the model does by itself.
    """
    parts = [_end_of(sequence) for sequence in sequences[:4]]
    parts = (parts * 4)[:4]
    rows = [PackedSequence((parts[0], parts[1], parts[2])), PackedSequence((parts[3], parts[0]))]
    with attending():
        packed = _logits(model, rows, pad_token_id, compute_dtype)
    distinct = {id(part): part for part in parts}
    each = {
        key: _logits(model, [one], pad_token_id, compute_dtype)[0] for key, one in distinct.items()
    }
    difference = 0.0
    for number, row in enumerate(rows):
        start = 0
        for part in row.parts:
            end = start + len(part.input_ids)
            alone = each[id(part)]
            scale = float(alone.max() - alone.min())
            apart = float((packed[number, start:end] - alone).abs().max())
            of_range = apart / max(scale, 1e-6)
            difference = max(difference, of_range if math.isfinite(of_range) else math.inf)
            start = end
    return Leakage(difference, _LIMIT[compute_dtype])


def leaking(asked: str, leakage: Leakage) -> ModelError:
    """The refusal of what `asked` for several examples in a row."""
    return ModelError(f"{asked}: in this model {told_of(leakage)}. Set {asked}: false.")


def told_of(leakage: Leakage) -> str:
    """What was found where examples are not isolated, for people."""
    return (
        f"the examples of one row see each other (it moves a logit by {leakage.difference:.1%} of "
        f"their range, rounding alone by less than {leakage.limit:.1%})"
    )


def _end_of(sequence: TokenSequence) -> TokenSequence:
    """Its last tokens: many rows begin alike, and a copy would be a poor stranger."""
    return TokenSequence(
        sequence.input_ids[-_PROBE_TOKENS:], sequence.labels[-_PROBE_TOKENS:], sequence.origin
    )


def _logits(
    model: nn.Module,
    rows: Sequence[PackedSequence | TokenSequence],
    pad_token_id: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    batch = IsolatingCollator(pad_token_id)(rows)
    device = next(model.parameters()).device
    was_training = model.training
    autocast = (
        nullcontext()
        if compute_dtype == torch.float32
        else torch.autocast(device.type, compute_dtype)
    )
    model.eval()
    with torch.no_grad(), autocast:
        logits = model(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            use_cache=False,
        ).logits
    model.train(was_training)
    assert isinstance(logits, torch.Tensor)
    return logits.float().cpu()
