"""Linear layers that compute with the quantized weight, and let the gradient pass through.

    y = x · Q(W + s·BA)ᵀ + b

Q rounds, so its derivative is zero almost everywhere; the straight-through estimator (Bengio et al.
2013, arXiv:1308.3432) takes it for one. With G = ∂L/∂y that makes

    ∂L/∂x = G · Q(W + s·BA)        ∂L/∂A = s · (G·B)ᵀ · x        ∂L/∂B = s · Gᵀ · (x·Aᵀ)

so the gradient of the adapter needs no matrix of the weight's size, and costs what it costs without
quantization. Nothing is clipped: every scale here follows the largest weight of its block, so no
weight can be stuck outside the range. (Where the largest is rounded down to 7/7.5 of itself, its
derivative through the scale is 0.93 and not the zero of a clipped estimator.)

Where the weight is trained itself, it is y = x · Q(W)ᵀ + b, and ∂L/∂W = Gᵀ · x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from qlora_kit.model.qat.aware import Aware
    from qlora_kit.model.qat.scheme import Codes, Scheme


@dataclass
class FakeQuantization:
    """What all quantized layers of a model share."""

    aware: Aware
    scheme: Scheme
    compute_dtype: torch.dtype
    """What the quantized weight is multiplied in."""
    is_on: bool = True
    """False in the updates before quantization sets in."""

    def quantize(self, merged: torch.Tensor) -> Codes:
        """merged: (out, in), float32."""
        rounded = merged.to(self.aware.merged_dtype)
        return self.scheme.quantize(rounded.to(self.compute_dtype))


@dataclass
class Held:
    """The codes of one layer, kept for as long as what they were made of stays the same.

    Micro-batches of an update, their recomputation under gradient checkpointing, the backward pass
    and a whole evaluation share them. What they were made of is compared by value: optimizers
    write past the version counters of torch.
    """

    codes: Codes | None = None
    made_of: tuple[torch.Tensor, ...] = ()

    def get(self, made_of: tuple[torch.Tensor, ...], make: Callable[[], Codes]) -> Codes:
        if self.codes is None or not self.is_made_of(made_of):
            self.codes = make()
            self.made_of = tuple(one.detach().clone() for one in made_of)
        return self.codes

    def is_made_of(self, made_of: tuple[torch.Tensor, ...]) -> bool:
        return _are_same(self.made_of, made_of)


def _are_same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return len(one) == len(other) and all(
        mine.device == theirs.device and torch.equal(mine, theirs)
        for mine, theirs in zip(one, other, strict=True)
    )


class QuantizedLora(lora.Linear):
    """PEFT's LoRA layer with the same parts under the same names, computing with Q(W + s·BA)."""

    def __init__(self, layer: lora.Linear, shared: FakeQuantization):
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.shared = shared
        self.held = Held()
        self.held_without_update = Held()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.shared.is_on or self.merged:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (adapter,) = self.active_adapters
        bias = self.get_base_layer().bias
        if self.disable_adapters:
            return product(x, None, None, bias, self.codes(adapter), 0.0, self._dtype)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling = float(self.scaling[adapter])
        return product(x, a, b, bias, self.codes(adapter), scaling, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self.shared.compute_dtype

    @torch.no_grad()
    def codes(self, adapter: str) -> Codes:
        """Of the merged weight; of the base's alone while the adapter is off."""
        if self.disable_adapters:
            return self.base_codes()
        weight = turned_weight(self.get_base_layer())
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight

        def make() -> Codes:
            with torch.autocast(a.device.type, enabled=False):
                return self.shared.quantize(weight.float() + (b @ a) * self.scaling[adapter])

        return self.held.get((a, b), make)

    @torch.no_grad()
    def base_codes(self) -> Codes:
        """Of the base's weight alone."""
        weight = turned_weight(self.get_base_layer())
        return self.held_without_update.get((), lambda: self.shared.quantize(weight.float()))


class QuantizedLinear(nn.Linear):
    """A linear layer without an adapter, computing with Q(W), where W is frozen or trained."""

    def __init__(self, layer: nn.Linear, shared: FakeQuantization):
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.shared = shared
        self.held = Held()
        self.is_trained = layer.weight.requires_grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.shared.is_on:
            return super().forward(x)
        return multiply(x, self)


class QuantizedConv1D(Conv1D):
    """The same for GPT-2's layer, whose weight is (in, out)."""

    def __init__(self, layer: Conv1D, shared: FakeQuantization):
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self.shared = shared
        self.held = Held()
        self.is_trained = layer.weight.requires_grad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.shared.is_on:
            result: torch.Tensor = super().forward(x)
            return result
        return multiply(x, self)


QuantizedLayer = QuantizedLora | QuantizedLinear | QuantizedConv1D


def turned_weight(layer: nn.Module) -> torch.Tensor:
    """(out, in), whatever way round the layer keeps it."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def codes_of(layer: QuantizedLinear | QuantizedConv1D) -> Codes:
    """Of a trained W what is compared, and so kept, is its rounding: all that they depend on."""
    shared, weight = layer.shared, turned_weight(layer)
    made_of = (weight.to(shared.aware.merged_dtype),) if layer.is_trained else ()
    return layer.held.get(made_of, lambda: shared.quantize(weight.float()))


def multiply(x: torch.Tensor, layer: QuantizedLinear | QuantizedConv1D) -> torch.Tensor:
    """x · Q(W)ᵀ + b, with the gradients of W and b where those are trained."""
    shared, weight, codes = layer.shared, turned_weight(layer), codes_of(layer)
    if not layer.is_trained:
        return product(x, None, None, layer.bias, codes, 0.0, shared.compute_dtype)
    result: torch.Tensor = _TrainedProduct.apply(
        x, weight, layer.bias, codes, shared.aware.merged_dtype, shared.compute_dtype
    )
    return result


def product(
    x: torch.Tensor,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    bias: torch.Tensor | None,
    codes: Codes,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x · Qᵀ + b, with the gradients of A and B where there are any."""
    result: torch.Tensor = _Product.apply(x, a, b, bias, codes, scaling, dtype)
    return result


class _Product(torch.autograd.Function):
    """x · Qᵀ + b with the gradients of A and B, Q being Q(W + s·BA)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        bias: torch.Tensor | None,
        codes: Codes,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.codes, ctx.scaling, ctx.dtype = codes, scaling, dtype
        # As PEFT: low-rank products in float32, unless autocast says otherwise.
        is_autocast = torch.is_autocast_enabled(x.device.type)
        ctx.low_rank_dtype = (
            torch.get_autocast_dtype(x.device.type) if is_autocast else torch.float32
        )
        return _times(x, codes, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        x, a, b = ctx.saved_tensors
        d_x = d_a = d_b = None
        if ctx.needs_input_grad[0]:
            d_x = (gradient.to(ctx.dtype) @ ctx.codes.dense(ctx.dtype)).to(x.dtype)
        if a is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            g = _rows(gradient).to(ctx.low_rank_dtype)
            inputs = _rows(x).to(ctx.low_rank_dtype)
            low_a, low_b = a.to(ctx.low_rank_dtype), b.to(ctx.low_rank_dtype)
            d_a = ctx.scaling * ((g @ low_b).T @ inputs).to(a.dtype)
            d_b = ctx.scaling * (g.T @ (inputs @ low_a.T)).to(b.dtype)
        return d_x, d_a, d_b, None, None, None, None


class _TrainedProduct(torch.autograd.Function):
    """x · Q(W)ᵀ + b with the gradients of W and b, b being rounded as it will be on the disk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        codes: Codes,
        merged_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.codes, ctx.dtype = codes, dtype
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _times(x, codes, None if bias is None else bias.to(merged_dtype), dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].to(ctx.dtype)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (gradient @ ctx.codes.dense(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (_rows(gradient).T @ _rows(x).to(ctx.dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            d_bias = _rows(gradients[0]).float().sum(dim=0).to(ctx.bias_dtype)
        return d_x, d_weight, d_bias, None, None, None


def _times(
    x: torch.Tensor, codes: Codes, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """As a Linear4bit layer: in its own dtype, and back in that of the input."""
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return nn.functional.linear(x.to(dtype), codes.dense(dtype), bias).to(x.dtype)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """(tokens, features), whatever stands before."""
    return values.reshape(-1, values.shape[-1])
