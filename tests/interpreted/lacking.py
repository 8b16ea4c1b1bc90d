"""What Triton's interpreter lacks of CUDA's library; imported only where it is switched on."""

from __future__ import annotations

from typing import Any

import triton
from triton import language as tl


@triton.jit
def rsqrt(x: Any) -> Any:
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x: Any) -> Any:
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
