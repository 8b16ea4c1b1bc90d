"""Rotary embeddings as one operation beside transformers' own function for them."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qlora_kit.model.fused.rotary import RotaryForward, is_rotation

Pair = tuple[torch.Tensor, torch.Tensor]


def given(dtype: torch.dtype, of_angles: torch.dtype) -> tuple[Pair, Pair]:
    """Queries of four heads and keys of two, 7 tokens of width 8; cosines and sines."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    angles = torch.randn(1, 7, 4).repeat(1, 1, 2)
    return (q.to(dtype), k.to(dtype)), (angles.cos().to(of_angles), angles.sin().to(of_angles))


@pytest.mark.parametrize("of_angles", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_transformers_own(dtype: torch.dtype, of_angles: torch.dtype) -> None:
    """Also where wide norms make queries of another type than the cosines."""
    heads, angles = given(dtype, of_angles)
    assert is_rotation(apply_rotary_pos_emb, *heads, *angles)
    found: list[list[torch.Tensor]] = []
    for rotate in (apply_rotary_pos_emb, RotaryForward(apply_rotary_pos_emb)):
        q, k = (one.clone().requires_grad_() for one in heads)
        rotated = rotate(q, k, *angles)
        torch.manual_seed(1)
        torch.autograd.backward(rotated, [torch.randn(one.shape).to(one) for one in rotated])
        assert q.grad is not None
        assert k.grad is not None
        found.append([*rotated, q.grad, k.grad])
    tolerance = 1e-6 if dtype == of_angles == torch.float32 else 2e-2
    for own, ours in zip(*found, strict=True):
        assert own.dtype == ours.dtype
        torch.testing.assert_close(ours, own, rtol=tolerance, atol=tolerance)


def test_half_of_a_head_is_left_to_its_own() -> None:
    (q, k), (cos, sin) = given(torch.float32, torch.float32)
    assert not is_rotation(apply_rotary_pos_emb, q, k, cos[..., :4], sin[..., :4])
