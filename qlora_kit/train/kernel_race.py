"""Which of Liger's kernels are faster than torch's operations on this GPU, and as exact."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_kit.model.fused import gated, liger, norm, rotary
from qlora_kit.model.fused.gated import Activation, Gated, GatedOps
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.norm import NormForward, NormKind, NormOps
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.rotary import Rotary, RotaryOps
from qlora_kit.model.heads import heads_of

NUM_TOKENS = 4096
_NUM_RUNS = 7
# Less is within the noise of a clock.
_LEAST_GAIN = 1.02

Run = Callable[[], tuple[torch.Tensor, ...]]
"""Forward and backward: results and gradients."""


@dataclass(frozen=True)
class Pair:
    """The same, computed by torch and by Liger."""

    by_torch: Run
    by_liger: Run


@dataclass(frozen=True)
class Raced:
    """Of one operation."""

    gain: float
    """Of Liger's, the time of torch's over its own."""
    apart: float
    """Of results and gradients, relative to their size, at most."""

    @property
    def is_faster(self) -> bool:
        return self.gain >= _LEAST_GAIN


def raced(pair: Pair, seconds: Callable[[Run], float]) -> Raced:
    """Both sides in turns, after a first one that compiles.

    Args:
        seconds: how long one run takes.
    """
    apart = _apart(pair.by_liger(), pair.by_torch())
    turns = [(seconds(pair.by_torch), seconds(pair.by_liger)) for _ in range(_NUM_RUNS)]
    ours, theirs = (statistics.median(one[side] for one in turns) for side in range(2))
    return Raced(ours / theirs, apart)


def pair_of(
    operation: str,
    model: nn.Module,
    parts: LeanParts,
    dtype: torch.dtype,
    num_tokens: int = NUM_TOKENS,
) -> Pair | None:
    """Of the model's own widths, on its device; None where there is nothing to compute so.

    Args:
        operation: of `liger.OPERATIONS`.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if operation == liger.NORM and parts.norms:
        return _of_norms(model, parts, drawn, num_tokens)
    if operation == liger.GATED and parts.mlps:
        return _of_gated(model, parts, drawn, num_tokens)
    heads = heads_of(model)
    if operation == liger.ROTARY and parts.rotary and heads is not None:
        return _of_rotary(heads, drawn, num_tokens)
    return None


def seconds_on_a_gpu(run: Run) -> float:
    """Between two events of its queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _of_norms(model: nn.Module, parts: LeanParts, drawn: Any, num_tokens: int) -> Pair:
    """One of each width: narrow ones are of each head, and Liger has another kernel for so many
    short rows.
    """
    by_width: dict[int, tuple[nn.Module, NormKind]] = {}
    for name, kind in parts.norms.items():
        module = model.get_submodule(name)
        assert isinstance(module.weight, torch.Tensor)
        by_width.setdefault(len(module.weight), (module, kind))
    widest = max(by_width)
    given = {
        width: [drawn(1, num_tokens * (widest // width), width) for _ in range(2)]
        for width in by_width
    }

    def run(ops: NormOps) -> tuple[torch.Tensor, ...]:
        made = []
        for width, (module, kind) in by_width.items():
            x, gradient = given[width]
            leaf = x.detach().requires_grad_()
            y = NormForward(module, kind, Origins(), ops)(leaf)
            made += [y, *torch.autograd.grad(y, leaf, gradient.to(y.dtype))]
        return tuple(made)

    return Pair(lambda: run(norm.BY_TORCH), lambda: run(liger.LigerNorm()))


def _of_gated(model: nn.Module, parts: LeanParts, drawn: Any, num_tokens: int) -> Pair:
    module: Any = model.get_submodule(parts.mlps[0])
    act: Activation = module.act_fn
    gate, up, given = (drawn(1, num_tokens, module.gate_proj.out_features) for _ in range(3))

    def run(ops: GatedOps) -> tuple[torch.Tensor, ...]:
        # Liger's gradients come to lie where these were.
        leaves = [one.clone().requires_grad_() for one in (gate, up)]
        y = Gated.apply(*leaves, act, ops)
        return y, *torch.autograd.grad(y, leaves, given)

    return Pair(lambda: run(gated.BY_TORCH), lambda: run(liger.LigerGated()))


def _of_rotary(heads: tuple[int, int, int], drawn: Any, num_tokens: int) -> Pair:
    num_heads, num_keys, width = heads
    q, of_q = (drawn(1, num_tokens, num_heads, width).transpose(1, 2) for _ in range(2))
    k, of_k = (drawn(1, num_tokens, num_keys, width).transpose(1, 2) for _ in range(2))
    angles = drawn(1, num_tokens, width // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def run(ops: RotaryOps) -> tuple[torch.Tensor, ...]:
        leaves = [one.clone().requires_grad_() for one in (q, k)]
        inner = [one * 1 for one in leaves]  # leaves are not to be written to
        y = Rotary.apply(*inner, cos, sin, ops)
        gradients = torch.autograd.grad(y, leaves, (of_q.clone(), of_k.clone()))
        return *y, *gradients

    return Pair(lambda: run(rotary.BY_TORCH), lambda: run(liger.LigerRotary()))


def _apart(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    sizes = [float(one.detach().float().norm()) for one in wanted]
    pairs = zip(found, wanted, strict=True)
    off = [float((one.detach().float() - other.detach().float()).norm()) for one, other in pairs]
    return max(one / size if size else one for one, size in zip(off, sizes, strict=True))
