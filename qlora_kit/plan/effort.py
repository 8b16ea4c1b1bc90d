"""What a training step has to do, counted: products, bytes moved, operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_GROUPED_PRODUCT = _aten._grouped_mm  # which torch's own counter does not know
_DEVICE = torch.ops.prim.device  # asked of tensors without numbers at every turn


@dataclass
class Effort:
    """Of one or several passes."""

    products: int = 0
    """Floating-point operations in products of matrices and attention."""
    moved_bytes: int = 0
    """Read and written by all other operations."""
    num_operations: int = 0

    def averaged(self, other: Effort, number: int) -> Effort:
        """Of one like this, and all others of so many like the other."""
        mine, theirs = vars(self), vars(other)
        return Effort(
            **{name: (mine[name] + (number - 1) * theirs[name]) // number for name in mine}
        )


class CountedEffort(TorchDispatchMode):
    """Adds up what operations have to do, with numbers or without."""

    def __init__(self) -> None:
        super().__init__()
        self.effort = Effort()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        made = function(*args, **options)
        effort, packet = self.effort, function._overloadpacket
        if packet is _DEVICE:
            return made
        effort.num_operations += 1
        if packet in (_ATTENTION, _ATTENTION_BACKWARD):
            effort.products += _attention_products(packet, args)
        elif packet is _GROUPED_PRODUCT:
            effort.products += _grouped_products(args[0].shape, args[1].shape)
        elif packet in flop_registry:
            effort.products += int(flop_registry[packet](*args, **options, out_val=made))
        elif not function.is_view:
            effort.moved_bytes += sum(map(_num_bytes, tree_leaves((args, options, made))))
        return made


def _attention_products(packet: Any, args: Any) -> int:
    """Of a causal one, which computes half of its scores: two products forward, five backward
    (Dao et al. 2022, https://arxiv.org/abs/2205.14135).
    """
    query = args[0] if packet is _ATTENTION else args[1]
    key = args[1] if packet is _ATTENTION else args[2]
    num_products = 2 if packet is _ATTENTION else 5
    products: int = num_products * math.prod(query.shape) * int(key.shape[-2])
    return products


def _grouped_products(one: Sequence[int], other: Sequence[int]) -> int:
    """Of rows, columns or what two matrices share, each of which meets one group's matrix alone."""
    if len(one) > len(other):  # (G, M, K) with columns (K, S)
        return 2 * one[-2] * math.prod(other)
    return 2 * math.prod(one) * other[-1]


def _num_bytes(one: Any) -> int:
    return one.numel() * one.element_size() if isinstance(one, torch.Tensor) else 0
