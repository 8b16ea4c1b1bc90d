"""Attention in blocks beside torch's own in float64, in every way that a model may ask for it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qlora_kit.model import blockwise_attention
from qlora_kit.model.blockwise_attention import FEWEST_TOKENS, attend, covers

BF16 = torch.bfloat16
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads(
    length: int,
    dtype: torch.dtype = torch.float32,
    num_key_heads: int = 2,
    width_of_values: int = 16,
    num_rows: int = 2,
) -> Heads:
    """As the layers of a model give them: (B, S, heads, D), seen as (B, heads, S, D)."""
    torch.manual_seed(length)
    sizes = ((4, 16), (num_key_heads, 16), (num_key_heads, width_of_values))
    q, k, v = (torch.randn(num_rows, length, *one).to(dtype).transpose(1, 2) for one in sizes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def exactly(given: Heads, scale: float | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(outputs, gradients) in float64."""
    q, k, v = (one.detach().double().requires_grad_() for one in given)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    y = y.transpose(1, 2)
    return y, gradients(y, (q, k, v))


def gradients(out: torch.Tensor, given: Heads) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(out, given, torch.randn(out.shape).to(out)))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach().double() - other.detach()).norm() / other.detach().norm())


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head at a time, as where a block of all of them would not fit the cache."""
    monkeypatch.setattr(blockwise_attention, "_SCORE_BYTES", 1)


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("num_key_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [FEWEST_TOKENS, 225, 320])
@pytest.mark.parametrize("width_of_values", [16, 8])
def test_outputs_and_gradients_are_those_of_float64(
    scale: float | None, num_key_heads: int, length: int, width_of_values: int
) -> None:
    given = heads(length, num_key_heads=num_key_heads, width_of_values=width_of_values)
    assert covers(*given)
    out = attend(*given, scale)
    wanted, of_wanted = exactly(given, scale)
    assert out.shape == (2, length, 4, width_of_values)
    assert out.is_contiguous()
    assert distance(out, wanted) < 1e-6
    for one, other in zip(gradients(out, given), of_wanted, strict=True):
        assert distance(one, other) < 1e-6


def test_a_head_at_a_time_it_is_the_same(in_small_parts: None) -> None:
    given = heads(225, num_rows=3)
    out = attend(*given)
    wanted, of_wanted = exactly(given)
    assert distance(out, wanted) < 1e-6
    for one, other in zip(gradients(out, given), of_wanted, strict=True):
        assert distance(one, other) < 1e-6


def test_a_gradient_of_any_layout_is_taken() -> None:
    """The same one for all places, and one that lies the other way round."""
    given = heads(225)
    out = attend(*given)
    for strange in (
        torch.randn(1, 1, 1, 16).expand(out.shape),
        torch.randn(2, 16, 4, 225).permute(0, 3, 2, 1),
    ):
        found = torch.autograd.grad(out, given, strange, retain_graph=True)
        wanted = torch.autograd.grad(out, given, strange.contiguous(), retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < 1e-6


def test_heads_that_do_not_come_out_even_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time of six, and four of them."""
    given = heads(225, num_rows=3)
    wanted, of_wanted = exactly(given)
    of_one = 32 * 2 * 225 * 4
    for at_a_time in (2, 4):
        monkeypatch.setattr(blockwise_attention, "_SCORE_BYTES", at_a_time * of_one)
        out = attend(*given)
        assert distance(out, wanted) < 1e-6
        for one, other in zip(gradients(out, given), of_wanted, strict=True):
            assert distance(one, other) < 1e-6


def test_nobody_sees_what_comes_after() -> None:
    q, k, v = (one.detach() for one in heads(225))
    before = attend(q, k, v)
    k[:, :, 100:], v[:, :, 100:] = torch.inf, torch.nan
    assert torch.equal(attend(q, k, v)[:, :96], before[:, :96]), "other blocks than that of 100"


def test_in_bfloat16_it_is_nearer_to_the_exact_ones_than_torch_is() -> None:
    given = heads(256, BF16)
    assert covers(*given)
    out = attend(*given)
    assert out.dtype == BF16
    y = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True).transpose(1, 2)
    wanted, of_wanted = exactly(given)
    assert distance(out, wanted) < distance(y, wanted)
    for one, own, exact in zip(gradients(out, given), gradients(y, given), of_wanted, strict=True):
        assert one.dtype == BF16
        assert distance(one, exact) < distance(own, exact)


def test_autocast_decides_the_type_of_the_result() -> None:
    given = heads(256)
    with torch.autocast("cpu", dtype=BF16):
        assert covers(*given)
        out = attend(*given)
        of_heads = gradients(out, given)
    assert out.dtype == BF16
    assert all(one.dtype == torch.float32 for one in of_heads)


def test_of_scores_nothing_is_kept() -> None:
    """What torch's kernel keeps, less the sums of its rows."""
    given = heads(256)

    def kept_by(run: object) -> int:
        sizes: dict[int, int] = {}

        def noted(one: torch.Tensor) -> torch.Tensor:
            sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return one

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda one: one):
            made = run()  # type: ignore[operator]
        assert made.requires_grad
        return sum(sizes.values())

    ours = kept_by(lambda: attend(*given))
    theirs = kept_by(
        lambda: F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
    )
    assert 0 < ours < theirs


def test_short_long_and_other_shapes_are_left_to_torch() -> None:
    assert not covers(*heads(FEWEST_TOKENS - 1))
    assert covers(*heads(2048, num_rows=1))
    assert not covers(*heads(2049, num_rows=1))
    assert covers(*heads(768, BF16, num_rows=1))
    assert not covers(*heads(769, BF16, num_rows=1))
    assert not covers(*heads(256, torch.float16))
    assert not covers(*heads(256, num_key_heads=3))
    q, k, v = heads(256)
    assert not covers(q[:, :, -1:], k, v)
    assert not covers(q, k[..., :8], v)
    assert not covers(q, k[:1], v[:1])
    assert not covers(q[:0], k[:0], v[:0])
    assert not covers(*(one.to("meta") for one in (q, k, v)))


def test_second_derivatives_are_refused() -> None:
    given = heads(FEWEST_TOKENS)
    (of_q,) = torch.autograd.grad(attend(*given).square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        of_q.sum().backward()
