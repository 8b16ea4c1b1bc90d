"""Rows of which a mask hides nothing, without numbers by which transformers would see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

_SDPA = "sdpa"


@contextmanager
def hiding_nothing(wanted: bool = True) -> Iterator[None]:
    """torch's SDPA gets no mask that would only be causal, while the context lasts."""
    if not wanted:
        yield
        return

    def without(*sizes: Any, attention_mask: Any = None, **options: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = sdpa_mask(*sizes, **options)
        return mask

    AttentionMaskInterface.register(_SDPA, without)
    try:
        yield
    finally:
        AttentionMaskInterface.register(_SDPA, sdpa_mask)
