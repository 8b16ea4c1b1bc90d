"""Products by groups without numbers, beside those with them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kit.plan.numberless import Numberless

SHAPES = [((16, 8), (3, 8, 4)), ((3, 4, 8), (8, 16)), ((4, 16), (16, 8)), ((3, 4, 8), (3, 8, 4))]


def ends_for(one: tuple[int, ...], other: tuple[int, ...]) -> torch.Tensor | None:
    shared = len(one) == 2 or len(other) == 2
    return torch.tensor([4, 8, 16], dtype=torch.int32) if shared else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("one", "other"), SHAPES)
def test_the_form_is_that_of_the_kernel(
    one: tuple[int, ...], other: tuple[int, ...], dtype: torch.dtype
) -> None:
    def product() -> torch.Tensor:
        rows, columns = torch.ones(one, dtype=dtype), torch.ones(other, dtype=dtype)
        # Two matrices in each group are taken as they stand; others have to lie as kernels read.
        given = columns.mT.contiguous().mT if len(other) == 3 else columns
        return torch._grouped_mm(rows, given, offs=ends_for(one, other))

    real = product()
    with Numberless():
        imagined = product()
    assert (imagined.shape, imagined.dtype) == (real.shape, real.dtype)
    assert imagined.untyped_storage().nbytes() == real.untyped_storage().nbytes()


def test_gradients_of_rows_and_matrices() -> None:
    with Numberless():
        rows = torch.ones(16, 8, requires_grad=True)
        matrices = torch.ones(3, 8, 4, requires_grad=True)
        torch._grouped_mm(rows, matrices, offs=ends_for((16, 8), (3, 8, 4))).sum().backward()
        assert rows.grad is not None
        assert matrices.grad is not None
        assert (rows.grad.shape, matrices.grad.shape) == (rows.shape, matrices.shape)


def test_torch_s_own_rule_still_refuses_float32() -> None:
    """Else the class is not needed any more."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="BFloat16"):
        torch._grouped_mm(torch.ones(16, 8), torch.ones(3, 8, 4), offs=ends_for((16, 8), (3, 8, 4)))


def test_why_an_operation_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with Numberless(), pytest.raises(RuntimeError):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not caplog.records
    assert not logging.getLogger(fake_tensor.__name__).filters
