"""Products with frozen weights, by torch's own choice or by oneDNN.

torch leaves products in float32 on a CPU to MKL, which has its newest kernels for Intel's
processors alone. oneDNN, which torch brings along and takes for 16 bits, makes its kernels for the
processor that it finds: https://uxlfoundation.github.io/oneDNN/. The same numbers up to rounding.
They are read in blocks that suit these kernels; a weight that stays can lie in such blocks from the
start (`reordered`), in place of being brought into them in every product: the same bits.
"""

from __future__ import annotations

import torch


class Products:
    """By torch's own operations."""

    def product(
        self, left: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, K) by (M, K) transposed, and (M,) on each row."""
        return left @ weight.T if bias is None else torch.addmm(bias, left, weight.T)

    def add_product(
        self, total: torch.Tensor, left: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """total, (N, M), which nobody needs afterwards, and (N, K) by (M, K) transposed."""
        return total.addmm_(left, weight.T)


class OneDnnProducts(Products):
    """By the operation that torch's compiler takes for a linear layer on a CPU. It has no gradient
    of its own.
    """

    def product(
        self, left: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, K) by (M, K) transposed, and (M,) on each row. The weight may be `reordered`."""
        num_rows = len(left)
        if not num_rows:  # an expert that nobody asks
            return left.new_empty((0, weight.shape[0]))
        if num_rows < _FEWEST_ROWS.get(left.dtype, 1):
            return self.product(left.repeat(2, 1), weight, bias)[:1].clone()
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, weight, bias, "none", [], "")
        return made

    def add_product(
        self, total: torch.Tensor, left: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """total, (N, M), which nobody needs afterwards, and (N, K) by (M, K) transposed, rounded
        once.
        """
        if len(left) < _FEWEST_ROWS.get(left.dtype, 1):
            return total.add_(self.product(left, weight))
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            left, total, weight, None, "add"
        )
        return made


_NOT_BUILT = "torch was built without it"
BY_TORCH = Products()
BY_ONEDNN = OneDnnProducts()
# One row alone is added up in another order where the weight is reordered, in float32.
_FEWEST_ROWS = {torch.float32: 2, torch.bfloat16: 1}
# By which oneDNN chooses blocks; on processors looked at it makes no difference.
_USUAL_ROWS = 512


def reordered(weight: torch.Tensor) -> torch.Tensor:
    """(M, K) in blocks as oneDNN multiplies with it, which nothing else reads."""
    made: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_ROWS)
    return made


def products_with(weight: torch.Tensor, otherwise: Products) -> Products:
    """By which this weight can be multiplied."""
    return BY_ONEDNN if weight.is_mkldnn else otherwise


def why_no_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is in the way of oneDNN's products; None where nothing is."""
    if device.type != "cpu":
        return "it multiplies on a CPU"
    if dtype != torch.float32:
        return "torch takes it by itself in 16 bits"
    return None if torch.backends.mkldnn.is_available() else _NOT_BUILT


def why_no_reordered(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is in the way of weights in its blocks; None where nothing is."""
    if dtype == torch.float32:
        return why_no_onednn(device, dtype)
    if device.type != "cpu":
        return "it multiplies on a CPU"
    if not torch.backends.mkldnn.is_available():
        return _NOT_BUILT
    if dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"it has no kernels for {dtype} here"
    return None
