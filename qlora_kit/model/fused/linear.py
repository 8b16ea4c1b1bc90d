"""LoRA on frozen weights as one operation: y = x Wᵀ + b + s (x Aᵀ) Bᵀ, for layers that share x.

What PEFT's layer does in eight operations and three copies of the output, with the same numbers
up to rounding. Backward, with g the gradient of y and v = s g B:

    ∂x = g W + v A        ∂A = vᵀ x        ∂B = s gᵀ (x Aᵀ)

W is packed; it is unpacked once in each direction, and stays only where there is room
(`Residents`). Nor is x kept where it is
known how it can be made again (`Remade`). Hu et al. 2021,
https://arxiv.org/abs/2106.09685, and Dettmers et al. 2023, https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused.products import BY_TORCH, Products, products_with
from qlora_kit.model.fused.remade import Remade
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.quantized import is_four_bit


@dataclass(frozen=True)
class FrozenLinear:
    """A linear layer whose weight is not trained: 4-bit, or as it is."""

    module: Any
    residents: Residents = field(default_factory=Residents)
    products: Products = BY_TORCH
    of_outputs: Products | None = None
    """By which outputs are multiplied, where that is another."""

    @property
    def is_packed(self) -> bool:
        return is_four_bit(self.module.weight)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """(O, I), unpacked; not to be written to."""
        if self.is_packed:
            return self.residents.weight(self.module, dtype, lambda: self._unpacked(dtype))
        plain: torch.Tensor = self.module.weight.detach().to(dtype)
        return plain

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight = self.module.weight
        dense: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return dense.to(dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        bias = self.module.bias
        return None if bias is None else bias.detach().to(dtype)

    def output(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Of (N, I), (N, O)."""
        weight = self._multiplied(dtype, is_transposed=False)
        products = products_with(weight, self.of_outputs or self.products)
        return products.product(x, weight, self.bias(dtype))

    def gradient(
        self, g: torch.Tensor, dtype: torch.dtype, others: torch.Tensor | None
    ) -> torch.Tensor:
        """Of x, (N, I), given that of the output, and on that of other layers on the same x."""
        weight = self._multiplied(dtype, is_transposed=True)
        products = products_with(weight, self.products)
        if others is None:
            return products.product(g, weight)
        return products.add_product(others, g, weight)

    def _multiplied(self, dtype: torch.dtype, is_transposed: bool) -> torch.Tensor:
        """(O, I), or (I, O) for gradients: reordered where it stays so, or else as it is."""

        def made() -> torch.Tensor:
            weight = self.weight(dtype)
            return weight.T if is_transposed else weight

        found = self.residents.reordered(self.module, dtype, is_transposed, made)
        return made() if found is None else found


class _Inner(torch.autograd.Function):
    """x Aᵀ of several layers on one input, and all that their backward pass needs.

    It is a node of its own so that, where a layer of the model recomputes, all is there again
    before its last product with a weight: torch then stops, and that product is not made twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: torch.Tensor,
        remade: Remade | None,
        dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        flat = _flat(given, dtype)
        inner = flat @ _stacked(factors[0::2], dtype).T
        remade = remade or Remade(_same, (flat,))
        ctx.make, ctx.num_kept, ctx.num_factors = remade.make, len(remade.parts), len(factors)
        ctx.save_for_backward(*remade.parts, inner, *factors)
        return inner

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor | None) -> tuple[None, ...]:
        """Nothing: the gradients are those of `_SharedInput`."""
        return (None, None, None, *(None for _ in range(ctx.num_factors)))


class _SharedInput(torch.autograd.Function):
    """Several layers on one input; a layer has two factors, A (r, I) and B (O, r)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        inner: torch.Tensor,
        node: Any,
        layers: Sequence[FrozenLinear],
        scales: Sequence[float],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """(N, O) of each layer, no views, so that a model may write to them. `node` is the one of
        `_Inner` that made `inner`.
        """
        flat = _flat(x, dtype)
        downs, ups = factors[0::2], factors[1::2]
        outputs = []
        for layer, scale, up, part in zip(layers, scales, ups, _parts(downs), strict=True):
            y = layer.output(flat, dtype)
            y.addmm_(inner[:, part], up.to(dtype).T, alpha=scale)
            outputs.append(y.to(out_dtype))
        ctx.node = node
        ctx.layers, ctx.scales, ctx.dtype = layers, scales, dtype
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.is_dropped = dropped is not None
        ctx.dropped_dtype = None if dropped is None else dropped.dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        saved, num_kept = ctx.node.saved_tensors, ctx.node.num_kept
        kept, (inner, *factors) = saved[:num_kept], saved[num_kept:]
        dtype, x_needed = ctx.dtype, ctx.needs_input_grad[0]
        downs, ups = factors[0::2], factors[1::2]
        parts = _parts(downs)
        down = _stacked(downs, dtype)
        inner_gradient = torch.zeros_like(inner)
        of_x: torch.Tensor | None = None
        of_ups: list[torch.Tensor | None] = []
        for layer, scale, up, part, given_gradient in zip(
            ctx.layers, ctx.scales, ups, parts, gradients, strict=True
        ):
            if given_gradient is None:
                of_ups.append(None)
                continue
            g = _flat(given_gradient, dtype)
            torch.mm(g, up.to(dtype).mul(scale), out=inner_gradient[:, part])
            of_ups.append(_transposed_product(inner[:, part], g, scale, up.dtype))
            if x_needed:
                of_x = layer.gradient(g, dtype, of_x)
        of_dropped = None
        if ctx.is_dropped:
            of_dropped = (inner_gradient @ down).view(ctx.shape).to(ctx.dropped_dtype)
        elif x_needed and of_x is not None:
            of_x.addmm_(inner_gradient, down)
        given = _flat(ctx.node.make(*kept), dtype)
        of_down = inner_gradient.T @ given
        of_downs = [of_down[part].to(one.dtype) for one, part in zip(downs, parts, strict=True)]
        of_factors = [one for pair in zip(of_downs, of_ups, strict=True) for one in pair]
        if of_x is not None:
            of_x = of_x.view(ctx.shape).to(ctx.x_dtype)
        return of_x, of_dropped, None, None, None, None, None, None, *of_factors


def shared_input_lora(
    x: torch.Tensor,
    layers: Sequence[FrozenLinear],
    scales: Sequence[float],
    factors: Sequence[torch.Tensor],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    dropped: torch.Tensor | None = None,
    remade: Remade | None = None,
) -> tuple[torch.Tensor, ...]:
    """What each layer makes of x, with gradients for x and for the factors.

    Args:
        x: (…, I).
        factors: A (r, I) and B (O, r) of each layer, in turn.
        dtype: what the products are computed in.
        out_dtype: of the results.
        dropped: x after dropout, for the adapters; unset: x itself.
        remade: how x can be had again.

    Returns:
        One (…, O) for each layer.
    """
    with torch.autocast(x.device.type, enabled=False):
        given, remade = (x, remade) if dropped is None else (dropped, None)
        inner = _Inner.apply(given, remade, dtype, *factors)
        how = (tuple(layers), tuple(scales), dtype, out_dtype)
        outputs: tuple[torch.Tensor, ...] = _SharedInput.apply(
            x, dropped, inner, inner.grad_fn, *how, *factors
        )
        return tuple(_shaped_as(x, y) for y in outputs)


class _FrozenOutput(torch.autograd.Function):
    """x Wᵀ + b of a layer by itself, (N, O). Of x nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: FrozenLinear, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.shape, ctx.x_dtype = layer, dtype, x.shape, x.dtype
        return layer.output(_flat(x, dtype), dtype).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = grad_outputs
        of_x = ctx.layer.gradient(_flat(grad, ctx.dtype), ctx.dtype, None)
        return of_x.view(ctx.shape).to(ctx.x_dtype), None, None, None


def frozen_output(
    x: torch.Tensor, layer: FrozenLinear, dtype: torch.dtype, out_dtype: torch.dtype
) -> torch.Tensor:
    """What a layer makes of x, (…, I), with a gradient for it; the other arguments as above."""
    with torch.autocast(x.device.type, enabled=False):
        y: torch.Tensor = _FrozenOutput.apply(x, layer, dtype, out_dtype)
        return _shaped_as(x, y)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _shaped_as(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(N, O) as (…, O), where x is (…, I); N may be 0."""
    return y.view(*x.shape[:-1], y.shape[-1])


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _transposed_product(
    inner: torch.Tensor, g: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """s gᵀ inner, (O, r), by way of its transpose: for a narrow result that is twice as fast."""
    return (inner.T @ g).mul_(scale).T.to(dtype).contiguous()


def _stacked(downs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """All A of one input as one (Σr, I), so that x is read once."""
    return (downs[0] if len(downs) == 1 else torch.cat(list(downs))).to(dtype)


def _parts(downs: Sequence[torch.Tensor]) -> list[slice]:
    """Where each layer's ranks lie among all."""
    parts, at = [], 0
    for down in downs:
        parts.append(slice(at, at + len(down)))
        at += len(down)
    return parts


def is_frozen_linear(module: nn.Module) -> bool:
    """A plain linear layer or a 4-bit one, none of whose tensors is trained."""
    kind = type(module).__name__
    is_known = type(module) is nn.Linear or (
        kind == "Linear4bit" and is_four_bit(getattr(module, "weight", None))
    )
    return is_known and not any(one.requires_grad for one in module.parameters())
