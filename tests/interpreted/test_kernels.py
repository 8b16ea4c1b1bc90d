"""Liger's kernels against float32 autograd and against torch's operations of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qlora_kit.model.fused import gated, liger, norm, rotary
from qlora_kit.model.fused.gated import Gated
from qlora_kit.model.fused.norm import KINDS, NormForward, NormKind
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.rotary import Rotary

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3}
DTYPES = tuple(TOLERANCE)  # numpy, which the interpreter computes by, has no bfloat16


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().float(), other.detach().float()
    return float((one - other).norm() / other.norm())


class Norm(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(1 + drawn(24, seed=1).to(dtype) / 4, requires_grad=False)
        self.eps = 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_norms(dtype: torch.dtype, kind: NormKind) -> None:
    module = Norm(dtype)
    x = drawn(2, 5, 24, dtype=dtype).requires_grad_()
    given = drawn(2, 5, 24, dtype=dtype, seed=2)
    exact = x.detach().float().requires_grad_()
    scale = module.weight.float() + kind.offset
    wanted = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + module.eps) * scale
    (wanted_gradient,) = torch.autograd.grad(wanted, exact, given.float())

    origins = Origins()
    y = NormForward(module, kind, origins, liger.LigerNorm())(x)
    remade = origins.of(y)
    assert remade is not None
    assert torch.equal(remade.make(*remade.parts), y), "made again otherwise"
    (gradient,) = torch.autograd.grad(y, x, given)
    assert y.dtype == gradient.dtype == dtype
    assert apart(y, wanted) <= TOLERANCE[dtype]
    assert apart(gradient, wanted_gradient) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_many_short_rows(kind: NormKind) -> None:
    """Which Liger computes by another kernel, sixteen rows at a time."""
    x, given = drawn(2**15, 8), drawn(2**15, 8, seed=2)
    weight = 1 + drawn(8, seed=1) / 4
    found, wanted = [], []
    for ops, into in ((liger.LigerNorm(), found), (norm.BY_TORCH, wanted)):
        y, reciprocal = ops.forward(x, weight, 1e-5, kind)
        into += [y, ops.gradient(given, x, reciprocal, weight, kind)]
    for one, other in zip(found, wanted, strict=True):
        assert apart(one, other) <= TOLERANCE[torch.float32]


def test_a_weight_of_another_dtype_is_left_to_torch() -> None:
    """Llama's norm then gives the weight's dtype, Liger's the input's."""
    x = drawn(2, 24, dtype=torch.float16)
    weight = drawn(24, seed=1)
    for ops in (liger.LigerNorm(), norm.BY_TORCH):
        y, reciprocal = ops.forward(x, weight, 1e-5, KINDS[0])
        assert y.dtype == torch.float32
        of_x = ops.gradient(drawn(2, 24, seed=3), x, reciprocal, weight, KINDS[0])
        assert of_x.dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.SiLU(), "swiglu"), (nn.GELU(approximate="tanh"), "geglu"), (F.silu, "swiglu")],
)
def test_gated_mlps(dtype: torch.dtype, act: Any, name: str) -> None:
    assert liger.kernel_of(act) == name
    gate, up = (drawn(2, 5, 24, dtype=dtype, seed=n).requires_grad_() for n in range(2))
    given = drawn(2, 5, 24, dtype=dtype, seed=2)
    exact = [one.detach().float().requires_grad_() for one in (gate, up)]
    wanted = act(exact[0]) * exact[1]
    wanted_gradients = torch.autograd.grad(wanted, exact, given.float())
    y = Gated.apply(gate, up, act, liger.LigerGated())
    gradients = torch.autograd.grad(y, (gate, up), given)
    assert apart(y, wanted) <= TOLERANCE[dtype]
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert one.dtype == dtype
        assert apart(one, other) <= TOLERANCE[dtype]


def test_another_activation_is_left_to_torch() -> None:
    act = nn.ReLU()
    assert liger.kernel_of(act) is None
    gate, up, given = (drawn(3, 8, seed=n) for n in range(3))
    ours = liger.LigerGated()
    assert torch.equal(ours.product(gate, up, act), gated.BY_TORCH.product(gate, up, act))
    found = ours.gradients(given, gate, up, act)
    wanted = gated.BY_TORCH.gradients(given, gate, up, act)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_angles", [1, 2])
def test_rotary_embeddings(dtype: torch.dtype, num_angles: int) -> None:
    def heads(count: int, seed: int) -> torch.Tensor:
        return drawn(2, 5, count, 8, dtype=dtype, seed=seed).transpose(1, 2)

    angles = drawn(num_angles, 5, 4, seed=4).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    of = [heads(4, 2), heads(2, 3)]
    found = {}
    for ops in (rotary.BY_TORCH, liger.LigerRotary()):
        leaves = [heads(4, 0).requires_grad_(), heads(2, 1).requires_grad_()]
        q, k = (one * 1 for one in leaves)
        results = Rotary.apply(q, k, cos, sin, ops)
        gradients = torch.autograd.grad(results, leaves, [one.clone() for one in of])
        found[type(ops)] = (*results, *gradients)
    for one, other in zip(found[liger.LigerRotary], found[rotary.RotaryOps], strict=True):
        assert apart(one, other) <= TOLERANCE[dtype]
