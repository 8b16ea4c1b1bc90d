"""Codes and scales, against the libraries whose checkpoints they are."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

from qlora_kit.model.qat.integers import int4_group, int8
from qlora_kit.model.qat.nf4 import Nf4, quantize_on_cpu
from qlora_kit.quantize.int8.numbers import dequantize_weight, quantize_weight, weight_scales


def weights(rows: int = 96, columns: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """With zeros, a row of them, an outlier, and blocks of one sign."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * 0.05
    made[3] = 0
    made[5, 7:40] = 0
    made[8, 9] = 4.0
    made[9] = made[9].abs()
    return made.to(dtype)


class TestNf4:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("block_size", [32, 64, 128])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_is_bitsandbytes(
        self, block_size: int, double_quant: bool, dtype: torch.dtype
    ) -> None:
        weight = weights(dtype=dtype)
        codes = Nf4(block_size, double_quant).quantize(weight)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
        )
        assert torch.equal(codes.packed, packed)
        assert torch.equal(codes.dense(dtype), bnb.dequantize_4bit(packed, state))
        mine, theirs = codes.stored(), state.as_dict(packed=True)
        assert set(mine) == {".weight", *(f".weight.{name}" for name in theirs)}
        for name, tensor in theirs.items():
            assert torch.equal(mine[f".weight.{name}"], tensor), name

    def test_every_bound_falls_as_it_does_there(self) -> None:
        """At the bounds between codes, and at the numbers next to them."""
        code = bnb.get_4bit_type("nf4", device="cpu")
        near = []
        for bound in (code[:-1] + code[1:]) / 2:
            below = above = bound
            near.append(bound)
            for _ in range(3):
                below = torch.nextafter(below, torch.tensor(-2.0))
                above = torch.nextafter(above, torch.tensor(2.0))
                near += [below, above]
        numbers = torch.stack([*near, *code])
        blocks = torch.zeros(4, 64)
        blocks.view(-1)[torch.arange(256) % 64 > 0] = numbers.repeat(3)[:252]
        blocks[:, 0] = 1.0  # the scale, so that the numbers stay what they are
        packed, _ = quantize_on_cpu(blocks, 64)
        theirs, _ = bnb.quantize_4bit(blocks, blocksize=64, quant_type="nf4")
        assert torch.equal(packed, theirs)

    def test_a_last_block_that_is_not_full(self) -> None:
        weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
        codes = Nf4(64, True).quantize(weight)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(codes.packed, packed)
        assert torch.equal(codes.state.absmax, state.absmax)

    def test_a_weight_that_lies_otherwise_in_memory(self) -> None:
        weight = weights()
        turned = weight.T.contiguous().T
        assert torch.equal(
            Nf4(64, True).quantize(turned).packed, Nf4(64, True).quantize(weight).packed
        )


class TestIntegers:
    @pytest.mark.parametrize("group_size", [32, 64, 128])
    def test_four_bits_are_those_of_compressed_tensors(self, group_size: int) -> None:
        weight = weights()
        args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=group_size)
        groups = weight.view(len(weight), -1, group_size)
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        codes = int4_group(group_size, torch.float32).quantize(weight)
        used = groups.abs().amax(-1) > 0
        assert torch.equal(codes.scale[used], scale[used])
        assert torch.equal(codes.codes, quantize(weight, scale, zero, args, dtype=torch.int8))
        theirs = fake_quantize(weight, scale, zero, args)
        assert torch.equal(codes.dense(torch.float32), theirs)

    def test_four_bits_are_those_of_torchao_s_fake_quantizer(self) -> None:
        """But for halves: it multiplies with 1 / scale where this divides."""
        weight = weights()
        config = IntxFakeQuantizeConfig(torch.int4, group_size=64, is_symmetric=True)
        theirs = FakeQuantizerBase.from_config(config)(weight)
        codes = int4_group(64, torch.float32).quantize(weight)
        mine = codes.dense(torch.float32)
        other = mine != theirs
        quotient = weight / codes.scale.repeat_interleave(64, dim=1)
        is_half = (quotient.abs() % 1 - 0.5).abs() < 1e-5
        assert is_half[other].all()
        assert not is_half.all()

    def test_eight_bits_are_absmax_over_127_of_each_row(self) -> None:
        weight = weights()
        codes = int8(torch.float32).quantize(weight)
        for row, (integers, scale) in enumerate(zip(codes.codes, codes.scale, strict=True)):
            largest = float(weight[row].abs().max())
            assert float(scale) == pytest.approx(largest / 127 if largest else 1.0)
            wanted = [max(-127, min(127, round(float(w) / float(scale)))) for w in weight[row]]
            assert (integers - torch.tensor(wanted)).abs().max() <= 1  # halves, in float64 here
        assert (codes.dense(torch.float32) - weight).abs().max() <= codes.scale.max() / 2 * 1.001
        assert codes.codes.abs().max() == 127

    def test_eight_bits_are_those_of_the_method_int8(self) -> None:
        """`qlora-kit quantize --method int8` on the merged model makes the trained one too."""
        weight = weights()
        codes = int8(torch.float32).quantize(weight)
        scales = weight_scales(weight, "channel", 128)
        integers = quantize_weight(weight, scales)
        assert torch.equal(codes.codes, integers)
        assert torch.equal(codes.dense(torch.float32), dequantize_weight(integers, scales))

    def test_scales_are_rounded_before_they_are_used(self) -> None:
        """As a 16-bit checkpoint holds them."""
        weight = weights(dtype=torch.bfloat16)
        codes = int4_group(64, torch.bfloat16).quantize(weight)
        assert codes.scale.dtype == torch.bfloat16
        nearest = (
            weight.float().view(len(weight), -1, 64) / codes.scale.float().unsqueeze(-1)
        ).round()
        assert torch.equal(codes.codes.float(), nearest.clamp(-8, 7).view(weight.shape))
        assert codes.dense(torch.bfloat16).dtype == torch.bfloat16

    def test_four_bits_say_more_than_they_cost(self) -> None:
        stored = int4_group(64, torch.bfloat16).quantize(weights()).stored()
        num_bytes = sum(one.numel() * one.element_size() for one in stored.values())
        assert num_bytes <= weights().numel() * (4 + 16 / 64) / 8 + 16
