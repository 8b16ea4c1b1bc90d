"""Products by oneDNN against float64, and a frozen layer's gradient against torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qlora_kit.model.fused.linear import FrozenLinear, frozen_output
from qlora_kit.model.fused.products import (
    BY_ONEDNN,
    BY_TORCH,
    Products,
    reordered,
    why_no_onednn,
    why_no_reordered,
)
from qlora_kit.model.fused.residents import ReorderedEachTime, Residents, Room

BOTH = pytest.mark.parametrize("products", [BY_TORCH, BY_ONEDNN], ids=["torch", "oneDNN"])
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            why_no_reordered(torch.device("cpu"), torch.bfloat16) is not None,
            reason="no bfloat16 in this processor",
        ),
    ),
]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_they_are_those_of_float64(products: Products, num_rows: int) -> None:
    left, weight, bias = drawn(num_rows, 40), drawn(24, 40, seed=1), drawn(24, seed=2)
    exact = left.double() @ weight.T.double()
    assert torch.allclose(products.product(left, weight).double(), exact, atol=1e-5)
    with_bias = products.product(left, weight, bias).double()
    assert torch.allclose(with_bias, exact + bias.double(), atol=1e-5)
    g = drawn(num_rows, 24, seed=3)
    of_x = products.product(g, weight.T)
    assert torch.allclose(of_x.double(), g.double() @ weight.double(), atol=1e-5)
    assert of_x.is_contiguous()


@BOTH
def test_a_sum(products: Products) -> None:
    total, left, weight = drawn(5, 24), drawn(5, 40, seed=1), drawn(24, 40, seed=2)
    wanted = total.double() + left.double() @ weight.T.double()
    found = products.add_product(total, left, weight)
    assert torch.allclose(found.double(), wanted, atol=1e-5)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 64, 300])
@pytest.mark.parametrize("sizes", [(24, 40), (37, 100), (192, 576)])
def test_a_reordered_weight_gives_the_same_bits(
    sizes: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    height, width = sizes
    weight, bias = drawn(*sizes).to(dtype), drawn(height, seed=2).to(dtype)
    x, g = (drawn(num_rows, one, seed=3).to(dtype) for one in (width, height))
    onwards, back = reordered(weight), reordered(weight.T)
    product = BY_ONEDNN.product
    assert torch.equal(product(x, onwards, bias), product(x, weight, bias))
    assert torch.equal(product(g, back), product(g, weight.T))
    totals = [drawn(num_rows, width, seed=4).to(dtype) for _ in range(2)]
    sums = [
        BY_ONEDNN.add_product(total, g, one)
        for total, one in zip(totals, (back, weight.T), strict=True)
    ]
    assert torch.equal(*sums)


@pytest.mark.parametrize("num_rows", [1, 2, 300])
def test_in_bfloat16_they_are_torch_s_own_bits(num_rows: int) -> None:
    """Sums, too, which are rounded once: weights may stay in the layout and others not."""
    if why_no_reordered(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("no bfloat16 in this processor")
    weight = drawn(192, 576).bfloat16()
    x, total = drawn(num_rows, 576, seed=1).bfloat16(), drawn(num_rows, 192, seed=2).bfloat16()
    blocks = reordered(weight)
    assert torch.equal(BY_ONEDNN.product(x, blocks), BY_TORCH.product(x, weight))
    wanted = BY_TORCH.add_product(total.clone(), x, weight)
    assert torch.equal(BY_ONEDNN.add_product(total.clone(), x, blocks), wanted)
    twice = total + BY_TORCH.product(x, weight)
    assert num_rows < 300 or not torch.equal(twice, wanted)


def residents(num_bytes: int, is_for_reordered: bool = True) -> Residents:
    made = Residents(reorder=reordered)
    made.give(Room(num_bytes, is_for_reordered))
    return made


def test_a_layer_holds_its_weight_once_for_each_direction() -> None:
    module = nn.Linear(40, 24).requires_grad_(False)
    x, g = drawn(9, 40), drawn(9, 24, seed=1)
    stay = residents(2 * module.weight.nbytes)
    plain = FrozenLinear(module, products=BY_ONEDNN)
    layer = FrozenLinear(module, stay, BY_ONEDNN)
    for _ in range(2):
        assert torch.equal(layer.output(x, x.dtype), plain.output(x, x.dtype))
        assert torch.equal(layer.gradient(g, x.dtype, None), plain.gradient(g, x.dtype, None))
        assert (stay.num_bytes, stay.room_bytes) == (2 * module.weight.nbytes, 0)
    stay.release()
    assert (stay.num_bytes, stay.room_bytes) == (0, 0)
    assert torch.equal(layer.output(x, x.dtype), plain.output(x, x.dtype))


def test_without_room_for_both_directions_weights_stay_as_they_are() -> None:
    module = nn.Linear(40, 24).requires_grad_(False)
    stay = residents(module.weight.nbytes, is_for_reordered=False)
    assert stay.reordered(module, torch.float32, False, lambda: module.weight) is None
    held = stay.weight(module, torch.float32, lambda: module.weight.clone())
    assert stay.weight(module, torch.float32, pytest.fail) is held


def test_what_has_no_room_is_not_reordered() -> None:
    module = nn.Linear(40, 24).requires_grad_(False)
    stay = residents(module.weight.nbytes - 1)
    assert stay.reordered(module, torch.float32, False, lambda: module.weight) is None
    each_time = ReorderedEachTime(reorder=reordered)
    made = each_time.reordered(module, torch.float32, False, lambda: module.weight)
    assert made is not None
    assert made.is_mkldnn
    assert each_time.num_bytes == 0


def test_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert why_no_reordered(cpu, torch.float32) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert why_no_reordered(torch.device("cuda"), dtype) == "it multiplies on a CPU"
    assert "no kernels for torch.float16" in str(why_no_reordered(cpu, torch.float16))
    assert why_no_onednn(cpu, torch.float32) is None
    assert why_no_onednn(torch.device("cuda"), torch.float32) == "it multiplies on a CPU"
    assert why_no_onednn(cpu, torch.bfloat16) == "torch takes it by itself in 16 bits"
