"""How running out of memory shows, and a limit that brings it about."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from qlora_kit.train.out_of_memory import first_line, is_out_of_memory

LIMITED = """
import torch
from qlora_kit.train.out_of_memory import is_out_of_memory, limited_memory
with limited_memory(2048, "cpu"):
    torch.empty(64 * 1024**2, dtype=torch.uint8).fill_(1)
    try:
        torch.empty(4 * 1024**3, dtype=torch.uint8).fill_(1)
    except (RuntimeError, MemoryError) as error:
        print("limited", is_out_of_memory(error))
torch.empty(4 * 1024**3, dtype=torch.uint8)
print("free again")
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_running_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_limit_makes_allocations_fail_and_is_lifted_again() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["limited True", "free again"], done.stderr


def test_an_error_without_words_is_named() -> None:
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(RuntimeError("a\nb")) == "a"
