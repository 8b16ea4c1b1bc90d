"""Triton's kernels on a CPU, by Triton's interpreter, which a process has from its start or not at
all: `tests/unit/model/fused/test_liger.py` starts one with TRITON_INTERPRET=1 for this folder.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """With what the interpreter lacks: numbers as arguments of a kernel, as a GPU's driver hands
    them over, and the reciprocal root of CUDA's library.
    """
    import liger_kernel.ops.geglu as geglu
    import liger_kernel.ops.rms_norm as rms_norm
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter as known

    from . import lacking

    own = known._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            value = np.array([argument], dtype=np.float32)
            return tl.tensor(known.TensorHandle(value, tl.float32), tl.float32)
        return own(argument)

    known._implicit_cvt = converted
    rms_norm.rsqrt = lacking.rsqrt
    geglu.tanh = lacking.tanh
