"""Causal attention on a CPU in blocks of queries, each with the keys up to its own end alone.

torch's kernel for it (FlashAttention) multiplies with every key of up to 512 tokens, hidden or not,
and in many small products. Here a block of queries of all heads that share a key is one matrix, and
a product of it with a few hundred keys runs at the rate of any other: softmax(s q kᵀ) v, a row of
blocks at a time. Of scores nothing is kept; backward, with g the gradient of the output o,

    ∂v = pᵀ g        t = p (g vᵀ − Σ g o)        ∂q = s t k        ∂k = s tᵀ q

in float32 also where the model computes in bfloat16. Dao et al. 2022,
https://arxiv.org/abs/2205.14135, for the gradients; Rabe and Staats 2021,
https://arxiv.org/abs/2112.05682, for blocks without a kernel of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

FEWEST_TOKENS = 192
"""Of an example that gains by it."""
# Where torch's kernel, which leaves out what is hidden of long rows, is as fast.
_MOST_TOKENS = {torch.float32: 2048, torch.bfloat16: 1024}
_QUERIES_OF_A_BLOCK = 32
# Of the scores of a block, so that they stay in the cache of a core.
_SCORE_BYTES = 2**20


class _Attention(torch.autograd.Function):
    """Of q (B, heads, S, D), k (B, heads of them, S, D) and v (B, heads of them, S, E)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        queries, keys, values = _stacked(q, k, scale), _flat(k), _flat(v)
        made = queries.new_empty(*queries.shape[:2], v.shape[-1])
        for part in _parts(keys, times := q.shape[1] // k.shape[1]):
            key, value = keys[part], values[part]
            for end, query, out in _blocks(times, queries[part], made[part]):
                p = _probabilities(query, key[:, :end], times)
                torch.bmm(p, value[:, :end], out=out)
        out = _unstacked(made, q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        queries, keys, values = _stacked(q, k, ctx.scale), _flat(k), _flat(v)
        given = gradients[0].transpose(1, 2)
        g = _stacked(given, k)
        along = _stacked((given.float() * out.transpose(1, 2)).sum(-1, keepdim=True), k)
        of_queries = queries.new_empty(queries.shape)
        of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
        for part in _parts(keys, times := q.shape[1] // k.shape[1]):
            key, value, of_key, of_value = (one[part] for one in (keys, values, of_keys, of_values))
            rows = (one[part] for one in (queries, g, along, of_queries))
            for end, query, given, sums, of_query in _blocks(times, *rows):
                seen = key[:, :end]
                p = _probabilities(query, seen, times)
                of_value[:, :end].baddbmm_(p.mT, given)
                t = torch.bmm(given, value[:, :end].mT).sub_(sums).mul_(p)
                of_key[:, :end].baddbmm_(t.mT, query)
                torch.bmm(t, seen, out=of_query)
        of_q = _unstacked(of_queries.mul_(ctx.scale), q.shape).transpose(1, 2)
        return (
            of_q.to(q.dtype),
            of_keys.view_as(k).to(k.dtype),
            of_values.view_as(v).to(v.dtype),
            None,
        )


def covers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are of a CPU, in a type and of a length that gain."""
    num_tokens = query.shape[2]
    return (
        query.device.type == "cpu"
        and num_tokens == key.shape[2] == value.shape[2]
        and FEWEST_TOKENS <= num_tokens <= _MOST_TOKENS.get(_dtype_of(query), 0)
        and query.shape[1] % key.shape[1] == 0
        and key.shape[1] == value.shape[1]
        and query.shape[3] == key.shape[3]
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """(B, heads, S, D), (B, heads of keys, S, D) and (B, heads of keys, S, E) to (B, S, heads, E),
    where each token sees itself and those before it.

    Args:
        scale: of the products; unset: D^-½.
    """
    dtype = _dtype_of(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        given = (one.to(dtype) for one in (query, key, value))
        made: torch.Tensor = _Attention.apply(*given, scale)
    return made


def _parts(keys: torch.Tensor, times: int) -> list[slice]:
    """Of the N of keys (N, S, D), so many at a time that a block's scores stay in the cache."""
    num, num_tokens, _ = keys.shape
    of_one = _QUERIES_OF_A_BLOCK * times * num_tokens * keys.element_size()
    step = max(torch.get_num_threads(), _SCORE_BYTES // of_one)
    return [slice(first, first + step) for first in range(0, num, step)]


def _blocks(times: int, *rows: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """(how many keys a block sees, its rows of each of these), those of one token after another."""
    size = _QUERIES_OF_A_BLOCK
    ends = range(size, rows[0].shape[1] // times + size, size)
    return zip(ends, *(one.split(size * times, dim=1) for one in rows), strict=True)


def _probabilities(query: torch.Tensor, key: torch.Tensor, times: int) -> torch.Tensor:
    """(n, R, keys) of a block of queries, whose own keys are the last."""
    scores = torch.bmm(query, key.mT)
    num_tokens = query.shape[1] // times
    scores[..., -num_tokens:].add_(_hidden(num_tokens, times))
    return scores.softmax(-1)


@lru_cache(maxsize=64)
def _hidden(num_tokens: int, times: int) -> torch.Tensor:
    """(num_tokens · times, num_tokens): −∞ where a key is behind its query."""
    whole = torch.full((num_tokens, num_tokens), -torch.inf).triu(1)
    return whole.repeat_interleave(times, 0)


def _stacked(heads: torch.Tensor, keys: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """(B, heads, S, D) as (B · heads of keys, S · heads of queries for each, D), in float32 and
    times `scale`.
    """
    num_rows, num_keys = keys.shape[:2]
    grouped = heads.unflatten(1, (num_keys, -1)).transpose(2, 3).to(torch.float32)
    made: torch.Tensor = grouped.mul(scale) if scale != 1 else grouped
    return made.reshape(num_rows * num_keys, -1, heads.shape[-1])


def _unstacked(made: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The way back, as (B, S, heads, E) of heads of this shape."""
    num_rows, num_heads, num_tokens, _ = shape
    grouped = made.view(num_rows, -1, num_tokens, num_heads * num_rows // len(made), made.shape[-1])
    return grouped.transpose(1, 2).reshape(num_rows, num_tokens, num_heads, -1).contiguous()


def _flat(heads: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, D) as (B · heads, S, D), in float32."""
    return heads.to(torch.float32).reshape(-1, *heads.shape[2:])


def _dtype_of(query: torch.Tensor) -> torch.dtype:
    """What autocast, which does not know these operations by themselves, would compute in."""
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype
