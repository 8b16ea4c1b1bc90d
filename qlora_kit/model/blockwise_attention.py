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
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kit.model.short_attention import dtype_of_products

FEWEST_TOKENS = 192
"""Of an example that gains by it."""
MOST_TOKENS = {torch.float32: 2048, torch.bfloat16: 768}
"""Of one, by what the model computes in; of longer ones torch leaves out what is hidden."""
_QUERIES_OF_A_BLOCK = 32
# Of the scores of a block, so that they stay in the cache of a core.
_SCORE_BYTES = 2**20


class _Attention(torch.autograd.Function):
    """Of q (B, heads, S, D), k (B, heads of them, S, D) and v (B, heads of them, S, E)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        times = q.shape[1] // k.shape[1]
        queries, keys, values = _stacked(q, k, scale), _flat(k), _flat(v)
        made = queries.new_empty(*queries.shape[:2], v.shape[-1])
        hidden = _hidden(times)
        for part in _parts(keys, times):
            key, value = keys[part], values[part]
            for end, query, out in _blocks(times, queries[part], made[part]):
                p = _probabilities(query, key[:, :end], hidden)
                torch.bmm(p, value[:, :end], out=out)
        result = _unstacked(made, q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, result)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            q, k, v, out = ctx.saved_tensors
            return *_gradients(gradients[0], q, k, v, out, ctx.scale), None


def _gradients(
    of_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of q, k and v, given that of the output."""
    times = q.shape[1] // k.shape[1]
    queries, keys, values = _stacked(q, k, scale), _flat(k), _flat(v)
    whole = of_out.transpose(1, 2)
    g = _stacked(whole, k)
    along = _stacked((whole.float() * out.transpose(1, 2)).sum(-1, keepdim=True), k)
    of_queries = queries.new_empty(queries.shape)
    of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
    hidden = _hidden(times)
    for part in _parts(keys, times):
        key, value, of_key, of_value = (one[part] for one in (keys, values, of_keys, of_values))
        rows = (one[part] for one in (queries, g, along, of_queries))
        for end, query, given, sums, of_query in _blocks(times, *rows):
            seen = key[:, :end]
            p = _probabilities(query, seen, hidden)
            of_value[:, :end].baddbmm_(p.mT, given)
            t = torch.bmm(given, value[:, :end].mT).sub_(sums).mul_(p)
            of_key[:, :end].baddbmm_(t.mT, query)
            torch.bmm(t, seen, out=of_query)
    of_q = _unstacked(of_queries.mul_(scale), q.shape).transpose(1, 2)
    return of_q.to(q.dtype), of_keys.view_as(k).to(k.dtype), of_values.view_as(v).to(v.dtype)


def covers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these are of a CPU, in a type and of a length that gain."""
    num_tokens = query.shape[2]
    return (
        query.device.type == "cpu"
        and num_tokens == key.shape[2] == value.shape[2]
        and 0 < query.shape[0] == key.shape[0] == value.shape[0]
        and FEWEST_TOKENS <= num_tokens <= MOST_TOKENS.get(dtype_of_products(query), 0)
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
    dtype = dtype_of_products(query)
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


def _probabilities(query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """(n, R, keys) of a block of R queries, whose own keys are the last."""
    scores = torch.bmm(query, key.mT)
    num_rows = query.shape[1]
    num_own = num_rows * hidden.shape[1] // hidden.shape[0]
    scores[..., -num_own:].add_(hidden[:num_rows, :num_own])
    return scores.softmax(-1)


def _hidden(times: int) -> torch.Tensor:
    """Of a block with its own keys, (queries · times, keys): −∞ where a key is behind its query."""
    whole = torch.full((_QUERIES_OF_A_BLOCK, _QUERIES_OF_A_BLOCK), -torch.inf).triu(1)
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
