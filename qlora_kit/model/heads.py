"""How attention is divided among heads."""

from __future__ import annotations

from typing import Any

from torch import nn


def heads_of(model: nn.Module) -> tuple[int, int, int] | None:
    """(heads of queries, of keys, their width), as most layers of a model have them; None where its
    configuration does not say, or says it of each layer.
    """
    whole: Any = model
    try:
        config = whole.config.get_text_config()
        num = config.num_attention_heads
        num_keys = getattr(config, "num_key_value_heads", None) or num
        return num, num_keys, getattr(config, "head_dim", None) or config.hidden_size // num
    except (AttributeError, RuntimeError):  # the latter of configurations by layer
        return None
