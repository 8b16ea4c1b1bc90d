"""Attention of short examples beside torch's own, in every way that a model may ask for it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qlora_kit.model.short_attention import attend, covers

BF16 = torch.bfloat16
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(length: int, dtype: torch.dtype = BF16, num_key_heads: int = 2) -> Heads:
    torch.manual_seed(length)
    q = torch.randn(2, length, 4, 16).transpose(1, 2)
    k, v = (torch.randn(2, length, num_key_heads, 16).transpose(1, 2) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def gradients(out: torch.Tensor, given: Heads) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(out, given, torch.randn(out.shape).to(out)))


def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: object) -> torch.Tensor:
    y: torch.Tensor = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)  # type: ignore[arg-type]
    return y.transpose(1, 2).contiguous()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [2, 33, 256])
def test_outputs_are_the_same_bits_and_gradients_nearer_to_the_exact_ones(
    is_causal: bool, scale: float | None, num_key_heads: int, length: int
) -> None:
    given = heads(length, num_key_heads=num_key_heads)
    assert covers(*given)
    ours, theirs, exact = (tuple(one.clone().requires_grad_() for one in given) for _ in range(3))
    exact = tuple(one.detach().double().requires_grad_() for one in exact)
    out = attend(*ours, is_causal, scale)
    wanted = own(*theirs, is_causal=is_causal, scale=scale)
    assert torch.equal(out, wanted)
    truth = gradients(own(*exact, is_causal=is_causal, scale=scale), exact)
    for one, other, true in zip(
        gradients(out, ours), gradients(wanted, theirs), truth, strict=True
    ):
        assert one.dtype == BF16
        # Of two tokens there are too few numbers to tell.
        assert distance(one, true) < distance(other, true) * (2 if length == 2 else 1)


def test_autocast_decides_what_it_computes_in() -> None:
    given = tuple(one.requires_grad_() for one in heads(20, torch.float32))
    assert not covers(*given)
    with torch.autocast("cpu", dtype=BF16):
        assert covers(*given)
        out = attend(*given, True)
        assert torch.equal(out, own(*given, is_causal=True))
    assert all(one.dtype == torch.float32 for one in gradients(out, given))


def test_long_and_other_shapes_are_left_to_torch() -> None:
    assert not covers(*heads(257))
    assert not covers(*heads(1))
    assert not covers(*heads(20, torch.float32))
    assert not covers(*heads(20, num_key_heads=3))
    q, k, v = heads(20)
    assert not covers(q[:, :, -1:], k, v)
    assert not covers(q, k, v[..., :8])
