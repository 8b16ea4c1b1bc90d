"""Products by oneDNN against float64, and a frozen layer's gradient against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qlora_kit.model.fused.linear import FrozenLinear, frozen_output
from qlora_kit.model.fused.products import (
    BY_TORCH,
    OneDnnProducts,
    Products,
    why_no_onednn,
)

BOTH = pytest.mark.parametrize("products", [BY_TORCH, OneDnnProducts()], ids=["torch", "oneDNN"])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_they_are_those_of_float64(products: Products, num_rows: int) -> None:
    left, weight, bias = drawn(num_rows, 40), drawn(24, 40, seed=1), drawn(24, seed=2)
    exact = left.double() @ weight.T.double()
    assert torch.allclose(products.product(left, weight.T).double(), exact, atol=1e-5)
    with_bias = products.product(left, weight.T, bias).double()
    assert torch.allclose(with_bias, exact + bias.double(), atol=1e-5)
    g = drawn(num_rows, 24, seed=3)
    of_x = products.product(g, weight)
    assert torch.allclose(of_x.double(), g.double() @ weight.double(), atol=1e-5)
    assert of_x.is_contiguous()


@BOTH
def test_a_sum_stays_where_it_is(products: Products) -> None:
    total, left, right = drawn(5, 24), drawn(5, 40, seed=1), drawn(40, 24, seed=2)
    wanted = total.double() + left.double() @ right.double()
    found = products.add_product(total, left, right)
    assert found.data_ptr() == total.data_ptr()
    assert torch.allclose(total.double(), wanted, atol=1e-5)


@BOTH
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_frozen_layer_is_as_before(products: Products, has_bias: bool) -> None:
    layer = nn.Linear(40, 24, bias=has_bias).requires_grad_(False)
    by_kit = FrozenLinear(layer, products=products)
    x, given = drawn(2, 9, 40), drawn(2, 9, 24, seed=1)

    def outcome(run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        return y.detach(), *torch.autograd.grad(y, leaf, given)

    def run(leaf: torch.Tensor) -> torch.Tensor:
        return frozen_output(leaf, by_kit, torch.float32, torch.float32)

    for one, other in zip(outcome(run), outcome(layer), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not run(x).requires_grad


@BOTH
def test_an_expert_that_nobody_asks_gives_nothing(products: Products) -> None:
    layer = FrozenLinear(nn.Linear(40, 24).requires_grad_(False), products=products)
    for shape in ((0, 40), (2, 0, 40)):
        leaf = torch.empty(shape, requires_grad=True)
        y = frozen_output(leaf, layer, torch.float32, torch.float32)
        assert y.shape == (*shape[:-1], 24)
        (of_x,) = torch.autograd.grad(y.sum(), leaf)
        assert of_x.shape == shape


@BOTH
def test_its_result_may_be_written_to(products: Products) -> None:
    """As OLMo clamps queries in place."""
    layer = nn.Linear(40, 24).requires_grad_(False)
    by_kit = FrozenLinear(layer, products=products)
    x = drawn(2, 9, 40)
    gradients = []
    for run in (lambda one: frozen_output(one, by_kit, torch.float32, torch.float32), layer):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(run(leaf).clamp_(-0.3, 0.3).square().sum(), leaf)
    assert torch.allclose(*gradients, atol=1e-5)


def test_where_it_cannot_be_had() -> None:
    cpu = torch.device("cpu")
    assert why_no_onednn(cpu, torch.float32) is None
    assert why_no_onednn(torch.device("cuda"), torch.float32) == "it multiplies on a CPU"
    assert why_no_onednn(cpu, torch.bfloat16) == "torch takes it by itself in 16 bits"
