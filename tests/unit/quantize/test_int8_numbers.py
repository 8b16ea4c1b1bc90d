"""The arithmetic of int8 against loops over single numbers, whole numbers in int64, and theory."""

from __future__ import annotations

import math

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant

from qlora_kit.quantize.int8.numbers import (
    _whole_number_product,
    dequantize_weight,
    integer_product,
    quantize_weight,
    scale_of,
    to_integers,
    token_scales,
    weight_scales,
)


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("granularity", "shape"), [("tensor", (1, 1)), ("channel", (6, 1)), ("group", (6, 4))]
)
def test_each_weight_is_rounded_by_the_scale_of_its_part(
    granularity: str, shape: tuple[int, int]
) -> None:
    weight = matrix(6, 32)
    scales = weight_scales(weight, granularity, 8)
    integers = quantize_weight(weight, scales)
    dense = dequantize_weight(integers, scales)

    assert scales.shape == shape
    for row in range(6):
        for column in range(32):
            rows = range(6) if granularity == "tensor" else [row]
            first = column // 8 * 8
            columns = range(first, first + 8) if granularity == "group" else range(32)
            largest = max(abs(float(weight[r, c])) for r in rows for c in columns)
            wanted = round(float(weight[row, column]) / (largest / 127))
            assert int(integers[row, column]) == wanted
            assert float(dense[row, column]) == pytest.approx(wanted * largest / 127, rel=1e-6)


def test_error_of_normal_weights_is_what_theory_says() -> None:
    """Rounding to steps of s has the variance s² / 12, with s = max|w| / 127 in every row."""
    weight = matrix(512, 512)
    scales = weight_scales(weight, "channel", 0)
    error = dequantize_weight(quantize_weight(weight, scales), scales) - weight

    assert float(error.square().mean().sqrt()) == pytest.approx(
        float((scales.square() / 12).mean().sqrt()), rel=0.02
    )
    largest = math.sqrt(2 * math.log(2 * 512))  # about where the largest of 512 normals lies
    assert float(error.norm() / weight.norm()) == pytest.approx(
        largest / 127 / math.sqrt(12), rel=0.15
    )


def test_finer_parts_have_a_smaller_error() -> None:
    weight = matrix(64, 256) * torch.linspace(0.1, 3, 256)
    errors = []
    for granularity in ("tensor", "channel", "group"):
        scales = weight_scales(weight, granularity, 32)
        dense = dequantize_weight(quantize_weight(weight, scales), scales)
        errors.append(float((dense - weight).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_rows_agree_with_bitsandbytes() -> None:
    weight = matrix(32, 64).half()
    theirs, theirs_scale, _ = int8_vectorwise_quant(weight)
    scales = weight_scales(weight, "channel", 0)
    ours = quantize_weight(weight, scales)

    assert torch.allclose(theirs_scale / 127, scales.flatten())
    assert int((theirs.int() - ours.int()).abs().max()) <= 1  # it divides in another order
    assert float((theirs == ours).float().mean()) > 0.99


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("num_in", [48, 3072])
def test_product_of_integers_is_exact(groups: int, num_in: int) -> None:
    """Against whole numbers in int64, at the largest values that there are."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(-127, 128, (5, num_in), generator=generator).to(torch.int8)
    weight = torch.randint(-127, 128, (7, num_in), generator=generator).to(torch.int8)
    inputs[0], weight[0] = 127, 127
    scales = torch.rand(7, groups, generator=generator) + 0.5
    input_scales = torch.rand(5, 1, generator=generator)

    columns = num_in // groups
    wanted = torch.zeros(5, 7, dtype=torch.float64)
    for group in range(groups):
        part = slice(group * columns, (group + 1) * columns)
        whole = inputs[:, part].long() @ weight[:, part].long().T
        wanted += whole.double() * scales[:, group].double()
    wanted *= input_scales.double()

    made = integer_product(inputs, input_scales, weight, scales)
    # Sums of groups are rounded to float32 each, relative to the largest.
    assert torch.allclose(made.double(), wanted, rtol=1e-6, atol=1e-7 * float(wanted.max()))


def test_sums_are_over_whole_numbers() -> None:
    """An odd sum of 26 bits, of which float32 would lose the last ones."""
    inputs = torch.full((1, 3072), 127, dtype=torch.int8)
    weight = inputs.clone()
    weight[0, -1] = 126
    assert int(_whole_number_product(inputs, weight)) == 3072 * 127 * 127 - 127


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 8)
    scales = weight_scales(weight, "channel", 0)
    assert torch.equal(scales, torch.ones(4, 1))
    assert torch.equal(quantize_weight(weight, scales), torch.zeros(4, 8, dtype=torch.int8))
    assert torch.equal(token_scales(torch.zeros(2, 3)), torch.ones(2, 1))


def test_what_exceeds_a_static_scale_is_cut_off() -> None:
    scale = scale_of(torch.tensor(2.0))
    assert to_integers(torch.tensor([2.0, 5.0, -5.0, 0.0]), scale).tolist() == [127, 127, -127, 0]
