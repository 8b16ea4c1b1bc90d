"""Products with frozen weights, by torch's own choice or by oneDNN.

torch leaves products in float32 on a CPU to MKL, which has its newest kernels for Intel's
processors alone. oneDNN, which torch brings along and takes for 16 bits, makes its kernels for the
processor that it finds: https://uxlfoundation.github.io/oneDNN/. The same numbers up to rounding.
"""

from __future__ import annotations

import torch


class Products:
    """By torch's own operations."""

    def product(
        self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, K) by (K, M), and (M,) on each row."""
        return left @ right if bias is None else torch.addmm(bias, left, right)

    def add_product(
        self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        """total, (N, M), with (N, K) by (K, M) on it, in its memory."""
        return total.addmm_(left, right)


class OneDnnProducts(Products):
    """By the operation that torch's compiler takes for a linear layer on a CPU. It has no gradient
    of its own.
    """

    def product(
        self, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, K) by (K, M), and (M,) on each row."""
        if not len(left):  # an expert that nobody asks
            return super().product(left, right, bias)
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, bias, "none", [], "")
        return made

    def add_product(
        self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        """total, (N, M), with (N, K) by (K, M) on it, in its memory."""
        return total.add_(self.product(left, right))


BY_TORCH = Products()


def why_no_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is in the way of oneDNN's products; None where nothing is."""
    if device.type != "cpu":
        return "it multiplies on a CPU"
    if dtype != torch.float32:
        return "torch takes it by itself in 16 bits"
    if not torch.backends.mkldnn.is_available():
        return "torch was built without it"
    return None
