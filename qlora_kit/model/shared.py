"""Whether all processes of a launch hold the same base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.word_sum import word_sum

if TYPE_CHECKING:
    from torch import nn

_SAMPLE_ELEMENTS = 1024


def state_checksum(model: nn.Module) -> str:
    """Of every weight and every quantization state: all words summed, and the ends of each.

    The same wherever they are, on a CPU or a GPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:_SAMPLE_ELEMENTS], flat[-_SAMPLE_ELEMENTS:]]).cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {word_sum(flat)}".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_same_base(checksums: Sequence[str]) -> None:
    """`state_checksum` of every process, in the order of ranks.

    Raises:
        ModelError: they differ: gradients of different models would be averaged.
    """
    other = [rank for rank, one in enumerate(checksums) if one != checksums[0]]
    if other:
        raise ModelError(
            f"processes {', '.join(map(str, other))} hold other base weights than process 0, "
            "although they have read the same files; quantized on another kind of GPU they may "
            "round otherwise. Train on GPUs of one kind, or let QLORA_KIT_CACHE name a folder "
            "that all machines share."
        )
