"""A linear layer whose weight is made of 8-bit integers."""

from __future__ import annotations

import torch
from torch import nn

from qlora_kit.quantize.int8.config import Activations, Int8Config
from qlora_kit.quantize.int8.numbers import (
    dequantize_weight,
    integer_product,
    to_integers,
    token_scales,
)


class Int8Linear(nn.Linear):
    """y = x Wᵀ + b with W = `weight` · `weight_scale`.

    It is an `nn.Linear`, so that whoever looks for linear layers (PEFT, the kit's counts) finds
    it. `weight` is int8 of shape (out, in); `weight_scale` float32 of shape (1, 1), (out, 1) or
    (out, groups); `input_scale`, with static activations, one float32 number. The bias is kept as
    it was.
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, config: Int8Config):
        super().__init__(in_features, out_features, bias)
        self.activations: Activations = config.activations
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False
        )
        rows = 1 if config.granularity == "tensor" else out_features
        groups = in_features // config.group_size if config.granularity == "group" else 1
        self.register_buffer("weight_scale", torch.empty(rows, groups, dtype=torch.float32))
        if config.activations == "static":
            self.register_buffer("input_scale", torch.empty((), dtype=torch.float32))

    def use_static(self, input_scale: torch.Tensor) -> None:
        """From now on inputs are rounded by this scale."""
        self.activations = "static"
        self.register_buffer("input_scale", input_scale.float().to(self.weight.device))

    def dequantized(self) -> torch.Tensor:
        """The weight in float32."""
        return dequantize_weight(self.weight, self.weight_scale)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: (…, in). Returns (…, out) in the dtype of the inputs."""
        if self.activations == "none":
            weight = self.dequantized().to(inputs.dtype)
            return nn.functional.linear(inputs, weight, self.bias)
        return self._in_integers(inputs)

    def _in_integers(self, inputs: torch.Tensor) -> torch.Tensor:
        tokens = inputs.reshape(-1, self.in_features)
        scale = self.input_scale if self.activations == "static" else token_scales(tokens)
        product = integer_product(to_integers(tokens, scale), scale, self.weight, self.weight_scale)
        if self.bias is not None:
            product = product + self.bias.float()
        return product.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations}"
