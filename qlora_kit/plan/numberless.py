"""Tensors without numbers, for operations whose rules in torch are narrower than their kernels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_GROUPED_PRODUCT = torch.ops.aten._grouped_mm


class Numberless(FakeTensorMode):
    """FakeTensorMode that also knows products by groups of rows, as mixtures of experts make them,
    in float32: torch's kernels compute them, and its rule for tensors without numbers refuses them.
    Why an operation cannot be tried is in the exception alone, not in a log as well.
    """

    def __init__(self) -> None:
        super().__init__()
        logging.getLogger(fake_tensor.__name__).addFilter(_is_no_echo)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function._overloadpacket is _GROUPED_PRODUCT and args[0].dtype == torch.float32:
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            num_groups = 0 if ends is None else len(ends)
            with self:
                return args[0].new_empty(_grouped_shape(args[0].shape, args[1].shape, num_groups))
        return super().__torch_dispatch__(function, types, args, kwargs)


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
