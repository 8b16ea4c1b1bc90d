"""How running out of memory shows, and a limit that brings it about."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from qlora_kit.errors import HardwareError
from qlora_kit.out_of_memory import first_line, in_batches_that_fit, is_out_of_memory

LIMITED = """
import torch
from qlora_kit.out_of_memory import is_out_of_memory, limited_memory
with limited_memory(2048, "cpu") as limit, limit.enforced():
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


class TestBatchesThatFit:
    def run(self, batches: list[list[int]], fits: int) -> tuple[list[int], list[int]]:
        """What came out, and how many were tried at a time."""
        tried = []

        def work(batch: Sequence[int]) -> list[int]:
            tried.append(len(batch))
            if len(batch) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [10 * one for one in batch]

        made = list(in_batches_that_fit(batches, work, "cpu"))
        assert all(result == [10 * one for one in batch] for batch, result in made)
        return [one for batch, _ in made for one in batch], tried

    def test_nothing_changes_where_they_fit(self) -> None:
        assert self.run([[1, 2, 3], [4]], 3) == ([1, 2, 3, 4], [3, 1])

    @pytest.mark.parametrize("fits", [1, 2, 3])
    def test_the_same_in_the_same_order_where_they_do_not(self, fits: int) -> None:
        batches = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13]]
        indices, tried = self.run(batches, fits)
        assert indices == list(range(1, 14))
        assert tried.count(7) == 1
        assert 5 not in tried, "a batch of a size that did not fit is not tried again"

    def test_one_that_is_too_much_is_the_end(self) -> None:
        with pytest.raises(HardwareError, match="one row at a time"):
            self.run([[1, 2]], 0)

    def test_other_errors_are_not_hidden(self) -> None:
        with pytest.raises(RuntimeError, match="shapes"):
            list(in_batches_that_fit([[1]], lambda _: fail("shapes"), "cpu"))


def fail(words: str) -> None:
    raise RuntimeError(words)
