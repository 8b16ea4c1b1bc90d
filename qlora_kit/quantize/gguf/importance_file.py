"""How llama.cpp keeps an importance matrix. Light: the process that quantizes reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SUMS, COUNTS = ".in_sum2", ".counts"
"""What follows a weight's name: for each feature of its input the sum of x², and how many x."""


def read_importance(path: Path) -> dict[str, Any]:
    """By tensor: (I,) in float32, the mean of x², as llama.cpp's quantizer takes it."""
    from gguf import GGUFReader

    tensors = {str(one.name): one.data for one in GGUFReader(path).tensors}
    return {
        name.removesuffix(SUMS): (data / tensors[name.removesuffix(SUMS) + COUNTS]).ravel()
        for name, data in tensors.items()
        if name.endswith(SUMS)
    }
