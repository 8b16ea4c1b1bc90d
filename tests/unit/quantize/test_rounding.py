"""The image of a weight is what the library's own layer computes with."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.export.dense import AsTrained, requantize
from qlora_kit.model.quantized import count_quantized
from qlora_kit.quantize.rounding import Rounding, image_of, shape_of
from qlora_kit.recipe import QuantizationSpec

WEIGHT = torch.randn(96, 160, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize(
    "rounding",
    [Rounding(), Rounding("nf4", 64, False), Rounding("fp4"), Rounding("int8")],
    ids=str,
)
def test_the_image_is_that_of_a_loaded_layer(rounding: Rounding) -> None:
    """Against the layers that a merge dequantizes, which are bitsandbytes' own."""
    spec = QuantizationSpec(
        load_in_8bit=rounding.kind == "int8",
        quant_type="fp4" if rounding.kind == "fp4" else "nf4",
        double_quant=rounding.double_quant,
    )
    wanted = requantize(WEIGHT, False, AsTrained(spec, torch.float32), rounding.num_bits)
    assert torch.equal(rounding.image(WEIGHT), wanted)


@pytest.mark.parametrize("block_size", [32, 128])
def test_other_block_sizes_are_the_librarys(block_size: int) -> None:
    packed, state = bnb.functional.quantize_4bit(
        WEIGHT, blocksize=block_size, quant_type="nf4", compress_statistics=True
    )
    wanted = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(Rounding("nf4", block_size).image(WEIGHT), wanted)
    assert torch.equal(Rounding("none").image(WEIGHT), WEIGHT)


def test_int4_rounds_each_block_to_the_nearest_step() -> None:
    weight = WEIGHT[:, :100]  # a row's last block is short
    found = Rounding("int4", 64).image(weight)
    for row in (0, 40):
        for start, end in ((0, 64), (64, 100)):
            block = weight[row, start:end]
            step = float((block.abs().max() / 7).half())
            wanted = [round(float(value) / step) * step for value in block]
            assert found[row, start:end].tolist() == pytest.approx(wanted, abs=1e-6)
    assert torch.equal(Rounding("int4").image(torch.zeros(4, 64)), torch.zeros(4, 64))


@pytest.mark.parametrize("rounding", [Rounding(), Rounding("nf4", 64, False)], ids=str)
def test_bytes_are_those_of_the_loaded_layer(rounding: Rounding) -> None:
    layer = bnb.nn.Linear4bit(
        160, 96, bias=False, quant_type="nf4", compress_statistics=rounding.double_quant
    )
    layer.load_state_dict({"weight": WEIGHT})
    assert rounding.num_bytes(96, 160) == count_quantized(layer.to("cpu")).weight_bytes
    assert Rounding("int8").num_bytes(96, 160) == 96 * 160 + 96 * 4
    assert Rounding("none").num_bytes(96, 160) == 2 * 96 * 160


def test_conv1d_is_turned() -> None:
    plain, turned = nn.Linear(160, 96, bias=False), Conv1D(96, 160)
    plain.weight.data, turned.weight.data = WEIGHT, WEIGHT.T.contiguous()
    assert shape_of(plain) == shape_of(turned) == (96, 160)
    assert torch.equal(image_of(turned, Rounding()).T, image_of(plain, Rounding()))


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no method nf5; take one of nf4, fp4"):
        Rounding("nf5")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"one of 32, 64.*got 48"):
        Rounding("nf4", 48)
