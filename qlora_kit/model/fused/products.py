"""Products with frozen weights, by torch's own choice or by oneDNN.

torch leaves products in float32 on a CPU to MKL, which has its newest kernels for Intel's
processors alone. oneDNN, which torch brings along and takes for 16 bits, makes its kernels for the
processor that it finds: https://uxlfoundation.github.io/oneDNN/. The same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.replaced import replaced_forward


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


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b, of which x alone has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear, products: Products) -> torch.Tensor:
        ctx.weight, ctx.products = layer.weight.detach(), products
        bias = None if layer.bias is None else layer.bias.detach()
        y = products.product(x.reshape(-1, x.shape[-1]), ctx.weight.T, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grad_outputs
        flat = grad.reshape(-1, grad.shape[-1])
        of_x = ctx.products.product(flat, ctx.weight)
        return of_x.view(*grad.shape[:-1], -1), None, None


@contextmanager
def multiplying_by(products: Products, layer: nn.Linear) -> Iterator[None]:
    """A linear layer whose tensors are not trained, while the context lasts."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _FrozenProduct.apply(x, layer, products)
        return y

    with replaced_forward(layer, forward):
        yield
