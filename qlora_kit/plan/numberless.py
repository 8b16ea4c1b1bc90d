"""Tensors without numbers, for operations whose rules in torch are narrower than their kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_GROUPED_PRODUCT = torch.ops.aten._grouped_mm
_ALIGNED_BYTES = 16
_REFUSED = (torch.float32, torch.float16)
_LOG = logging.getLogger(fake_tensor.__name__)


class Numberless(FakeTensorMode):
    """FakeTensorMode that also knows products by groups of rows, as mixtures of experts make them,
    in float32 and float16: torch's kernels for a CPU compute them, and its rule for tensors without
    numbers refuses them. Why an operation cannot be tried is in the exception alone, not in a log
    as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        _LOG.addFilter(_is_no_echo)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._depth -= 1
        if not self._depth:
            _LOG.removeFilter(_is_no_echo)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function._overloadpacket is _GROUPED_PRODUCT and args[0].dtype in _REFUSED:
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            num_groups = 0 if ends is None else len(ends)
            with self:
                return _with_aligned_rows(
                    args[0], _grouped_shape(args[0].shape, args[1].shape, num_groups)
                )
        return super().__torch_dispatch__(function, types, args, kwargs)


def _with_aligned_rows(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """As the kernels make it: every row begins at a multiple of 16 bytes."""
    numbers = _ALIGNED_BYTES // like.element_size()
    row = -(-shape[-1] // numbers) * numbers
    strides = (shape[-2] * row, row, 1)
    return like.new_empty_strided(shape, strides[-len(shape) :])


def _grouped_shape(one: Sequence[int], other: Sequence[int], num_groups: int) -> tuple[int, ...]:
    """Of a product of rows (S, K) with matrices (G, K, N), of matrices (G, M, K) with columns
    (K, S), of (M, S) with (S, N) for each group of the S, or of G matrices each.
    """
    if len(one) == len(other) == 2:
        return num_groups, one[0], other[1]
    if len(one) == len(other) == 3:
        return one[0], one[1], other[2]
    return one[-2], other[-1]


def _is_no_echo(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("failed while attempting to run meta")
