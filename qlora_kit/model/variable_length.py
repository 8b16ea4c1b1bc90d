"""Attention over a row of several examples as one call of torch's own FlashAttention, on a GPU.

Each example sees itself alone, and nothing is computed of what a mask would hide. Dao 2023,
https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from qlora_kit.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware

_DTYPES = (torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
_WIDEST = 256
_WIDTHS_ARE_MULTIPLES_OF = 8
_TRIAL_LENGTHS = (5, 33, 1, 90)
# Of a trial, relative to the size of what torch's SDPA gives for each example by itself.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
_FAILURES = (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError)

_failures: dict[tuple[Any, ...], str] = {}


def covers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes (B, heads, S, D) of this kind here, and has passed its trial."""
    if not query.is_cuda or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return False
    return is_sound(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[-1])


@lru_cache(maxsize=64)
def is_sound(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_key_heads: int, width: int
) -> bool:
    """Whether outputs and gradients of a few random examples are those of torch's SDPA."""
    if not is_suitable(device, dtype) or width > _WIDEST or width % _WIDTHS_ARE_MULTIPLES_OF:
        return False
    if num_heads % num_key_heads:
        return False
    try:
        apart = _tried(device, dtype, num_heads, num_key_heads, width)
    except _FAILURES as error:
        if is_out_of_memory(error):
            raise
        why = f"it fails ({type(error).__name__}: {error})"
    else:
        if apart <= _TOLERANCE[dtype]:
            return True
        why = f"on a trial it is {apart:.2g} of their size off"
    _failures[(str(device), str(dtype), num_heads, num_key_heads, width)] = why
    return False


def suits(hardware: Hardware, dtype: torch.dtype) -> bool:
    """Whether a trial would be worth it there: of a GPU that has bf16, as the kernel asks for."""
    return hardware.device == "cuda" and hardware.native_bf16 and dtype in _DTYPES


def knows_windows() -> bool:
    """Whether tokens can be kept from seeing what is far from them."""
    return "window_size" in _torch_kernel()[1]


def failures() -> tuple[str, ...]:
    """Why trials went wrong, of kernels that should have worked here."""
    return tuple(dict.fromkeys(_failures.values()))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[Sequence[int]],
    scale: float | None = None,
    is_causal: bool = True,
    window: int | None = None,
) -> torch.Tensor:
    """(B, S, heads, D) of queries (B, heads, S, D), and keys and values (B, key heads, S, D).

    Args:
        lengths: tokens of each example of each of the B rows.
        scale: of the products; unset: D^-½.
        window: tokens that each sees, itself the last of them; unset: all before it.
    """
    num_rows, _, num_tokens, _ = query.shape
    ends, longest = _ends(tuple(map(tuple, lengths)), query.device)
    flat = (_flat(query), _flat(key), _flat(value))
    return _kernel(*flat, ends, longest, scale, is_causal, window).view(
        num_rows, num_tokens, query.shape[1], -1
    )


def _flat(heads: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, D) as (B·S, heads, D)."""
    rows = heads.transpose(1, 2)
    return rows.reshape(-1, *rows.shape[2:])


@lru_cache(maxsize=4)
def _ends(lengths: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """(where examples begin and end among all tokens, int32; the longest)"""
    flat = [length for row in lengths for length in row]
    return torch.tensor([0, *accumulate(flat)], dtype=torch.int32, device=device), max(flat)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float | None,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    """(T, heads, D). torch's interface has changed from version to version."""
    run, known = _torch_kernel()
    options: dict[str, Any] = {}
    if "window_size" in known:
        before = -1 if window is None else window - 1
        options["window_size"] = (before, 0 if is_causal else -1)
    else:
        options["is_causal"] = is_causal
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    times = query.shape[1] // key.shape[1]
    if "enable_gqa" in known:
        options["enable_gqa"] = times > 1
    elif times > 1:
        key, value = (one.repeat_interleave(times, dim=1) for one in (key, value))
    found: torch.Tensor = run(query, key, value, ends, ends, longest, longest, **options)
    return found


@lru_cache(maxsize=1)
def _torch_kernel() -> tuple[Callable[..., Any], frozenset[str]]:
    """(the function, what it knows by name)"""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def is_suitable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is made for such numbers on such a device."""
    if device.type != "cuda" or dtype not in _DTYPES:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def _tried(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_key_heads: int, width: int
) -> float:
    """How far outputs and gradients are off, at most, relative to their size."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        made = torch.randn((1, heads, sum(_TRIAL_LENGTHS), width), generator=generator)
        return made.to(device, dtype).requires_grad_()

    given = (drawn(num_heads), drawn(num_key_heads), drawn(num_key_heads))
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        wanted = _one_by_one(*given)
        found = attend(*given, [_TRIAL_LENGTHS])
        direction = torch.randn(wanted.shape, generator=generator).to(device, dtype)
        of_wanted = torch.autograd.grad(wanted, given, direction)
        of_found = torch.autograd.grad(found, given, direction)
    pairs = zip((found, *of_found), (wanted, *of_wanted), strict=True)
    return max(
        float((one.detach() - other.detach()).float().norm() / other.detach().float().norm())
        for one, other in pairs
    )


def _one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """By torch's SDPA, (1, S, heads, D)."""
    times = query.shape[1] // key.shape[1]
    parts = zip(*(one.split(_TRIAL_LENGTHS, dim=2) for one in (query, key, value)), strict=True)
    made = [
        F.scaled_dot_product_attention(
            q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), is_causal=True
        )
        for q, k, v in parts
    ]
    return torch.cat(made, dim=2).transpose(1, 2)
