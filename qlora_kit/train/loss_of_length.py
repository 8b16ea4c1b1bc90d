"""A short pass, of which is counted what it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.train.snapshot import put_random_state_back, random_state

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.train.loader import AnyCollator
    from qlora_kit.train.surroundings import Surroundings


def loss_of_length(
    model: PeftModel, collator: AnyCollator, length: int, around: Surroundings
) -> torch.Tensor:
    """Of one sequence of that length, the end of which is supervised."""
    ids = tuple(range(1, length + 1))
    labels = (*(IGNORE_INDEX,) * (length - 2), *ids[-2:])
    batch = collator([TokenSequence(ids, labels, "")])
    device = next(model.parameters()).device
    tensors = {
        name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(around.precision)
    before = random_state()
    was_training = model.training
    model.train()
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss: torch.Tensor = model(**tensors, use_cache=False).loss
    finally:
        model.train(was_training)
        put_random_state_back(before)
    return loss
