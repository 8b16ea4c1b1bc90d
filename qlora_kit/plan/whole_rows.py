"""Rows of which a mask hides nothing, without numbers by which transformers would see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from qlora_kit.model import by_example

_SPARING = ("sdpa", by_example.NAME)
"""Attention that goes without a mask where it would only be causal."""


@contextmanager
def hiding_nothing(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """What is given to a model's attention, or made by its own code (OPT's), hides nothing, while
    the context lasts.
    """
    name = model.config._attn_implementation
    if not wanted or name not in _SPARING:
        yield
        return
    own = ALL_MASK_ATTENTION_FUNCTIONS[name]

    def without(*sizes: Any, attention_mask: Any = None, **options: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = own(*sizes, **options)
        return mask

    AttentionMaskInterface.register(name, without)
    try:
        yield
    finally:
        AttentionMaskInterface.register(name, own)
