"""`quantization_aware:` training on the quantized weights that will be shipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec, without_effect

_ONLY_NF4 = ("block_size", "double_quant")


class QuantizationAwareSpec(Spec):
    """The forward pass sees the trained weights quantized, and the gradient passes straight through
    (Bengio et al. 2013, arXiv:1308.3432), so that the quantized model is the one that was trained.
    """

    method: Literal["nf4", "int8", "int4-group"]
    """What the weights are quantized to. `nf4` is bitsandbytes' 4 bits; `int8` symmetric,
    a scale per output channel; `int4-group` symmetric, a scale per group of inputs (W4A16 of
    compressed-tensors)."""

    train: Literal["adapter", "full"] = "adapter"
    """What is trained: an `adapter` inside the weights, as `lora` describes it, or `full`, the
    weights and biases of every linear layer but the head themselves, for small models."""

    start_after: float = Field(default=0.0, ge=0)
    """Updates before quantization sets in; below 1, a share of all updates."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """nf4: weights that share a scale."""

    double_quant: bool = True
    """nf4: quantize the scales too, 4.13 instead of 4.50 bits per weight in blocks of 64."""

    group_size: Literal[32, 64, 128] = 64
    """int4-group: inputs of a row that share a scale; it must divide the inputs of each layer."""

    skip_modules: tuple[str, ...] = ()
    """Linear modules to leave unquantized, by name or part of one; added to the library's own
    list (the output head), never replacing it."""

    def contradictions(self) -> Iterator[Fault]:
        if self.method != "nf4":
            yield from without_effect(self, _ONLY_NF4, f"with method: {self.method}", "remove it")
        if self.method != "int4-group":
            why = f"with method: {self.method}"
            yield from without_effect(self, ("group_size",), why, "remove it")
        if self.start_after > 1 and self.start_after != int(self.start_after):
            message = f"must be whole above 1, got {self.start_after:g}"
            yield Fault("start_after", message, "below 1 it is a share of all updates")
        if not all(self.skip_modules):
            yield Fault("skip_modules", "must not hold empty text", "remove it")

    def first_update(self, num_updates: int) -> int:
        """How many updates are made before quantization sets in."""
        share = self.start_after
        return int(share * num_updates) if share < 1 else int(share)
