"""Products and gradients, against autograd and PEFT's own merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.qat.linear import (
    FakeQuantization,
    QuantizedConv1D,
    QuantizedLinear,
    QuantizedLora,
)
from qlora_kit.recipe import QuantizationAwareSpec

METHODS = {
    "nf4": {"method": "nf4"},
    "nf4, blocks of 32": {"method": "nf4", "block_size": 32, "double_quant": False},
    "int8": {"method": "int8"},
    "int4-group": {"method": "int4-group", "group_size": 32},
}


def shared(
    values: dict[str, Any],
    merged: torch.dtype = torch.float32,
    compute: torch.dtype = torch.float32,
) -> FakeQuantization:
    aware = Aware(QuantizationAwareSpec(**values), merged)
    return FakeQuantization(aware, aware.scheme(), compute)


def plain_lora(bias: bool = True, turned: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    holder = nn.Module()
    holder.layer = Conv1D(48, 64) if turned else nn.Linear(64, 48, bias=bias)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, fan_in_fan_out=turned
    )
    holder.to(dtype)
    inject_adapter_in_model(config, holder)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return holder.layer


def reference(layer: Any, quantization: FakeQuantization, x: torch.Tensor) -> torch.Tensor:
    """The detach trick: the quantized weight forward, the merged weight backward."""
    base = layer.get_base_layer()
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = weight.float() + (b @ a) * layer.scaling["default"]
    dense = quantization.quantize(merged.detach()).dense(quantization.compute_dtype)
    straight = merged.to(dense.dtype) + (dense - merged.to(dense.dtype)).detach()
    bias = None if base.bias is None else base.bias.to(dense.dtype)
    return nn.functional.linear(x.to(dense.dtype), straight, bias).to(x.dtype)


def gradients(layer: Any, compute: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Of a loss that weighs every output differently: y, d x, d A, d B."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 64, generator=generator).requires_grad_()
    layer.zero_grad()
    y = compute(x)
    (y.float() * torch.randn(y.shape, generator=generator)).sum().backward()
    assert x.grad is not None
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    return [one.clone() for one in found]


class TestLora:
    @pytest.mark.parametrize("method", METHODS)
    def test_the_gradient_passes_straight_through(self, method: str) -> None:
        quantization = shared(METHODS[method])
        layer = plain_lora()
        aware = QuantizedLora(layer, quantization)
        mine = gradients(aware, aware)
        theirs = gradients(layer, lambda x: reference(layer, quantization, x))
        assert torch.equal(mine[0], theirs[0])
        assert len(mine) == 4
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_gpt2_s_layer_which_is_the_other_way_round(self) -> None:
        quantization = shared(METHODS["nf4"])
        layer = plain_lora(turned=True)
        aware = QuantizedLora(layer, quantization)
        for one, other in zip(
            gradients(aware, aware),
            gradients(layer, lambda x: reference(layer, quantization, x)),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_what_is_quantized_is_what_peft_merges(self) -> None:
        quantization = shared(METHODS["nf4"])
        layer = plain_lora()
        codes = QuantizedLora(layer, quantization).codes("default")
        layer.merge(safe_merge=True)
        again = quantization.quantize(layer.get_base_layer().weight)
        assert torch.equal(codes.packed, again.packed)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_under_gradient_checkpointing(self, reentrant: bool) -> None:
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLora(plain_lora(), quantization)
        kept = gradients(aware, lambda x: checkpoint(aware, x, use_reentrant=reentrant))
        for one, other in zip(kept, gradients(aware, aware), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("is_autocast", [False, True])
    def test_in_bfloat16(self, is_autocast: bool) -> None:
        """The weights as a GPU has them; the update and its gradient in float32."""
        quantization = shared(METHODS["nf4"], torch.bfloat16, torch.bfloat16)
        layer = plain_lora(dtype=torch.bfloat16)
        aware = QuantizedLora(layer, quantization)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            mine = gradients(aware, aware)
        theirs = gradients(layer, lambda x: reference(layer, quantization, x))
        assert torch.equal(mine[0], theirs[0])
        assert [one.dtype for one in mine] == [torch.float32] * 4
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0.03, atol=0.1)

    def test_the_merged_weight_is_rounded_as_on_the_disk(self) -> None:
        layer = plain_lora()
        coarse = shared(METHODS["int8"], torch.bfloat16)
        merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
        mine = QuantizedLora(layer, coarse).codes("default")
        again = coarse.scheme.quantize(merged.detach().to(torch.bfloat16).float())
        assert torch.equal(mine.dense(torch.float32), again.dense(torch.float32))

    def test_the_parts_keep_their_names(self) -> None:
        layer = plain_lora()
        names = [name for name, _ in layer.named_parameters()]
        aware = QuantizedLora(layer, shared(METHODS["nf4"]))
        assert [name for name, _ in aware.named_parameters()] == names

    def test_without_its_update_it_is_the_quantized_base(self) -> None:
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLora(plain_lora(), quantization)
        x = torch.randn(3, 64)
        base = aware.get_base_layer()
        dense = quantization.quantize(base.weight.detach()).dense(torch.float32)
        aware.enable_adapters(False)
        assert torch.equal(aware(x), nn.functional.linear(x, dense, base.bias))
        aware.enable_adapters(True)
        assert not torch.equal(aware(x), nn.functional.linear(x, dense, base.bias))

    def test_switched_off_it_is_peft_s_layer(self) -> None:
        layer = plain_lora()
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLora(layer, quantization)
        quantization.is_on = False
        x = torch.randn(3, 64)
        assert torch.equal(aware(x), layer(x))


class Counting:
    """Counts how often a weight is quantized."""

    def __init__(self, quantization: FakeQuantization):
        self.scheme = quantization.scheme
        self.name = quantization.scheme.name
        self.count = 0
        quantization.scheme = self

    def quantize(self, weight: torch.Tensor) -> Any:
        self.count += 1
        return self.scheme.quantize(weight)


class TestHolding:
    def test_a_weight_is_quantized_once_for_an_update(self) -> None:
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLora(plain_lora(), quantization)
        counting = Counting(quantization)
        for _ in range(3):  # micro-batches, each with forward, recomputation and backward
            gradients(aware, lambda x: checkpoint(aware, x, use_reentrant=False))
        assert counting.count == 1

    def test_whatever_way_the_update_is_written(self) -> None:
        """bitsandbytes' optimizers write through `.data`, past torch's version counter."""
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLora(plain_lora(), quantization)
        counting = Counting(quantization)
        x = torch.randn(3, 64)
        before = aware(x)
        aware.lora_B["default"].weight.data[0, 0] += 1.0
        after = aware(x)
        assert counting.count == 2
        assert not torch.equal(before, after)
        with torch.no_grad():
            aware.lora_A["default"].weight[0, 0] += 1.0
        assert not torch.equal(aware(x), after)
        assert counting.count == 3

    def test_a_frozen_layer_is_quantized_once_for_all(self) -> None:
        quantization = shared(METHODS["nf4"])
        layer = nn.Linear(64, 48).requires_grad_(False)
        aware = QuantizedLinear(layer, quantization)
        counting = Counting(quantization)
        for _ in range(3):
            aware(torch.randn(2, 64))
        assert counting.count == 1


class TestFrozen:
    @pytest.mark.parametrize("is_turned", [False, True])
    def test_it_multiplies_with_the_quantized_weight(self, is_turned: bool) -> None:
        quantization = shared(METHODS["nf4"])
        torch.manual_seed(0)
        layer = Conv1D(48, 64) if is_turned else nn.Linear(64, 48)
        layer.requires_grad_(False)
        weight = layer.weight.T if is_turned else layer.weight
        dense = quantization.quantize(weight).dense(torch.float32)
        aware = (QuantizedConv1D if is_turned else QuantizedLinear)(layer, quantization)
        mine = gradients(aware, aware)
        theirs = gradients(layer, lambda x: nn.functional.linear(x, dense, layer.bias))
        assert len(mine) == 2
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
        quantization.is_on = False
        x = torch.randn(3, 64)
        assert torch.equal(aware(x), layer(x))


def trained_layer(is_turned: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return (Conv1D(48, 64) if is_turned else nn.Linear(64, 48)).to(dtype)


def straight_through(layer: Any, quantization: FakeQuantization, x: torch.Tensor) -> torch.Tensor:
    """The detach trick: weight and bias as on the disk forward, as they are backward."""
    compute, merged = quantization.compute_dtype, quantization.aware.merged_dtype
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    dense = quantization.quantize(weight.detach()).dense(compute)
    straight = weight.to(compute) + (dense - weight.to(compute)).detach()
    bias = layer.bias + (layer.bias.to(merged).to(layer.bias.dtype) - layer.bias).detach()
    return nn.functional.linear(x.to(compute), straight, bias.to(compute)).to(x.dtype)


class TestTrained:
    """Layers whose weight is trained itself."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("is_turned", [False, True])
    def test_the_gradient_passes_straight_through(self, method: str, is_turned: bool) -> None:
        quantization = shared(METHODS[method])
        layer = trained_layer(is_turned)
        aware = (QuantizedConv1D if is_turned else QuantizedLinear)(layer, quantization)
        mine = gradients(aware, aware)
        theirs = gradients(layer, lambda x: straight_through(layer, quantization, x))
        assert len(mine) == 4
        weight = layer.weight.T if is_turned else layer.weight
        dense = quantization.quantize(weight.detach()).dense(torch.float32)
        assert not torch.equal(dense, weight), "this test needs a weight between two codes"
        assert torch.equal(mine[0], theirs[0])
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("is_autocast", [False, True])
    def test_in_bfloat16(self, is_autocast: bool) -> None:
        """The weight and its gradient in float32, the product in bfloat16."""
        quantization = shared(METHODS["nf4"], torch.bfloat16, torch.bfloat16)
        layer = trained_layer()
        aware = QuantizedLinear(layer, quantization)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            mine = gradients(aware, aware)
        theirs = gradients(layer, lambda x: straight_through(layer, quantization, x))
        assert torch.equal(mine[0], theirs[0])
        assert [one.dtype for one in mine] == [torch.float32] * 4
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0.03, atol=0.1)

    def test_weight_and_bias_are_rounded_as_on_the_disk(self) -> None:
        coarse = shared(METHODS["int8"], torch.bfloat16)
        layer = trained_layer()
        aware = QuantizedLinear(layer, coarse)
        assert not torch.equal(layer.bias.bfloat16().float(), layer.bias)
        dense = coarse.scheme.quantize(layer.weight.detach().bfloat16().float())
        x = torch.randn(3, 64)
        wanted = nn.functional.linear(
            x, dense.dense(torch.float32), layer.bias.detach().bfloat16().float()
        )
        assert torch.equal(aware(x), wanted)

    def test_a_weight_is_quantized_once_for_an_update(self) -> None:
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLinear(trained_layer(), quantization)
        counting = Counting(quantization)
        for _ in range(3):
            gradients(aware, lambda x: checkpoint(aware, x, use_reentrant=False))
        assert counting.count == 1
        before = aware(torch.ones(3, 64))
        aware.weight.data[0, 0] += 1.0  # as optimizers write, past torch's version counter
        after = aware(torch.ones(3, 64))
        assert counting.count == 2
        assert not torch.equal(before, after)

    def test_frozen_for_a_while_it_still_follows_its_weight(self) -> None:
        """PEFT freezes the copy while the adapter is off."""
        quantization = shared(METHODS["nf4"])
        aware = QuantizedLinear(trained_layer(), quantization)
        x = torch.ones(3, 64)
        aware.requires_grad_(False)
        before = aware(x)
        aware.weight.data[0, 0] += 1.0
        assert not torch.equal(aware(x), before)

    def test_what_is_kept_of_it_is_its_rounding(self) -> None:
        quantization = shared(METHODS["nf4"], torch.bfloat16)
        aware = QuantizedLinear(trained_layer(), quantization)
        aware(torch.ones(3, 64))
        assert [one.dtype for one in aware.held.made_of] == [torch.bfloat16]
