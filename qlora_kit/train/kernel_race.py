"""Which other kernels are faster than torch's operations here, and as exact: Liger's on a GPU,
oneDNN's products and attention in blocks on a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qlora_kit.memory.allocator import freed_blocks_kept
from qlora_kit.model import blockwise_attention, short_attention
from qlora_kit.model.fused import gated, liger, norm, products, rotary
from qlora_kit.model.fused.attach import is_lora_layer
from qlora_kit.model.fused.gated import Activation, Gated, GatedOps, looks_gated
from qlora_kit.model.fused.lean import LeanParts
from qlora_kit.model.fused.linear import is_frozen_linear
from qlora_kit.model.fused.norm import NormForward, NormKind, NormOps
from qlora_kit.model.fused.products import Products
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.rotary import Rotary, RotaryOps
from qlora_kit.model.heads import heads_of
from qlora_kit.out_of_memory import is_out_of_memory
from qlora_kit.train.trial import TOLERANCE

PRODUCTS, LAYOUT, LOGITS = "products", "layout", "logits"
"""Beside `liger.OPERATIONS`: oneDNN's, with weights in its own layout, and of the head alone."""
_NUM_TOKENS = 4096
_NUM_TOKENS_OF_A_PRODUCT = 256
_LENGTHS_OF_EXAMPLES = (blockwise_attention.FEWEST_TOKENS, 256, 384, 512)
FEWEST_WEIGHTS = 1 << 17
"""Of a layer whose product takes long enough to be timed by a clock."""
# Of a head: as many entries of its vocabulary tell how fast a product with all of them is.
_MOST_ENTRIES = 1 << 14
_BYTES_BEYOND_A_CACHE = 1 << 25
_NUM_RUNS = 7
_NUM_RUNS_ON_A_CPU = 15
_FEWEST_RUNS = 3
_LONG_SECONDS = 2.0
LEAST_GAIN = 1.02
"""Less is within the noise of a clock."""

Run = Callable[[], tuple[torch.Tensor, ...]]
"""Forward and backward: results and gradients."""


@dataclass(frozen=True)
class Pair:
    """The same, computed by torch and by something else."""

    by_torch: Run
    by_other: Run


@dataclass(frozen=True)
class Raced:
    """Of one operation."""

    gain: float
    """The time of torch's over the other's."""
    apart: float
    """Of results and gradients, relative to their size, at most."""

    @property
    def is_faster(self) -> bool:
        return self.gain >= LEAST_GAIN


def raced_on_a_gpu(pair: Pair) -> Raced:
    """Both sides in turns, after a first one that compiles; the median of each counts."""
    apart = _apart(pair.by_other(), pair.by_torch())
    turns = [
        (seconds_on_a_gpu(pair.by_torch), seconds_on_a_gpu(pair.by_other)) for _ in range(_NUM_RUNS)
    ]
    ours, theirs = (statistics.median(one[side] for one in turns) for side in range(2))
    return Raced(ours / theirs, apart)


def raced_on_a_cpu(pair: Pair) -> Raced:
    """As there, but the best of each counts, which other work can only lengthen; in a heap as
    training has it.
    """
    turns: list[tuple[float, float]] = []
    with freed_blocks_kept(True):
        apart = _apart(pair.by_other(), pair.by_torch())
        while len(turns) < _NUM_RUNS_ON_A_CPU:
            turns.append((seconds_on_a_cpu(pair.by_torch), seconds_on_a_cpu(pair.by_other)))
            if len(turns) >= _FEWEST_RUNS and sum(map(sum, turns)) > _LONG_SECONDS:
                break
    ours, theirs = (min(one[side] for one in turns) for side in range(2))
    return Raced(ours / theirs, apart)


def raced_or_why(
    made: Callable[[], Pair | None],
    race: Callable[[Pair], Raced],
    precision: str,
    num_tokens: int,
) -> tuple[Raced | None, str | None]:
    """(how fast it is by itself; what is wrong with it); None twice where there is none.

    Args:
        made: the pair, if there is one.
        precision: bf16, fp16 or fp32, by which it is decided what is the same.
        num_tokens: that it is timed on.
    """
    try:
        pair = made()
        if pair is None:
            return None, None
        one = race(pair)
    except Exception as error:  # whatever a kernel or its compiler has to say
        if is_out_of_memory(error):
            return None, f"memory ran out on {num_tokens:,} tokens"
        return None, f"it fails ({type(error).__name__}: {error})"
    if not one.apart <= TOLERANCE[precision]:
        return None, f"{one.apart:.2g} of their size off"
    return one, None


def timed_tokens(operation: str) -> int:
    """How many it is timed on."""
    return _NUM_TOKENS_OF_A_PRODUCT if operation in _OF_PRODUCTS else _NUM_TOKENS


def timed_tokens_of(longest: int) -> int:
    """As many attention is timed on, where that is the longest example; 0 where it is too short."""
    return max((one for one in _LENGTHS_OF_EXAMPLES if one <= longest), default=0)


def pair_of(
    operation: str,
    model: nn.Module,
    parts: LeanParts,
    dtype: torch.dtype,
    num_tokens: int = 0,
) -> Pair | None:
    """Of the model's own widths, on its device; None where there is nothing to compute so.

    Args:
        operation: of `liger.OPERATIONS`, `PRODUCTS`, `LAYOUT` or `LOGITS`.
        num_tokens: 0: as many as that operation is timed on.
    """
    num_tokens = num_tokens or timed_tokens(operation)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if operation in _OF_PRODUCTS:
        sizes = timed_sizes(model, operation)
        return None if sizes is None else _OF_PRODUCTS[operation](sizes, drawn, num_tokens)
    if operation == liger.NORM and parts.norms:
        return _of_norms(model, parts, drawn, num_tokens)
    gated_mlps = [one for one in map(model.get_submodule, parts.mlps) if looks_gated(one)]
    if operation == liger.GATED and gated_mlps:
        return _of_gated(gated_mlps[0], drawn, num_tokens)
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


def seconds_on_a_cpu(run: Run) -> float:
    """By the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed_sizes(model: nn.Module, operation: str) -> tuple[int, int] | None:
    """Width of the output and of the input of the layer that products are timed on; None where
    there is none.
    """
    if operation != LOGITS:
        return most_weights(model)
    find = getattr(model, "get_output_embeddings", None)
    head: Any = find() if find is not None else None
    if not isinstance(head, nn.Linear) or not is_frozen_linear(head):
        return None
    return min(int(head.out_features), _MOST_ENTRIES), int(head.in_features)


def most_weights(model: nn.Module) -> tuple[int, int] | None:
    """Width of the output and of the input of those frozen layers that hold the most weights
    together, of all that have an adapter; None where there are none.
    """
    weights: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        layer: Any = getattr(module, "base_layer", None)
        if is_lora_layer(module) and is_frozen_linear(layer):
            sizes = (int(layer.out_features), int(layer.in_features))
            weights[sizes] += sizes[0] * sizes[1]
    return max(weights, key=lambda sizes: weights[sizes], default=None)


def _of_products(sizes: tuple[int, int], drawn: Any, num_rows: int) -> Pair:
    """x Wᵀ, and g W, the gradient of x."""
    height, width = sizes
    weight, x, g = drawn(height, width), drawn(num_rows, width), drawn(num_rows, height)

    def run(by: Products) -> tuple[torch.Tensor, ...]:
        return by.product(x, weight), by.product(g, weight.T)

    return Pair(lambda: run(products.BY_TORCH), lambda: run(products.BY_ONEDNN))


def _of_logits(sizes: tuple[int, int], drawn: Any, num_rows: int) -> Pair:
    """x Wᵀ alone: of a wide output it is another matter than the gradient."""
    weight, x = drawn(*sizes), drawn(num_rows, sizes[1])

    def run(by: Products) -> tuple[torch.Tensor, ...]:
        return (by.product(x, weight),)

    return Pair(lambda: run(products.BY_TORCH), lambda: run(products.BY_ONEDNN))


def _of_layouts(sizes: tuple[int, int], drawn: Any, num_rows: int) -> Pair:
    """The same products, of weights as torch holds them and of such that lie reordered: of so many
    that each comes from memory, as in a pass through a model. In 16 bits torch's own stand beside
    those by oneDNN, as they are what is taken otherwise.
    """
    height, width = sizes
    x, g = drawn(num_rows, width), drawn(num_rows, height)
    weight = drawn(height, width)
    num = max(_BYTES_BEYOND_A_CACHE // weight.nbytes, 1)
    as_torch = [(one, one.T) for one in (weight, *(weight.clone() for _ in range(num - 1)))]
    blocks = [tuple(map(products.reordered, one)) for one in as_torch]

    plain = products.BY_ONEDNN if weight.dtype == torch.float32 else products.BY_TORCH

    def run(by: Products, weights: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        made = [(by.product(x, onwards), by.product(g, back)) for onwards, back in weights]
        return made[-1]

    return Pair(lambda: run(plain, as_torch), lambda: run(products.BY_ONEDNN, blocks))


_OF_PRODUCTS = {PRODUCTS: _of_products, LAYOUT: _of_layouts, LOGITS: _of_logits}


def attention_pair(heads: tuple[int, int, int], num_tokens: int, dtype: torch.dtype) -> Pair:
    """Of one example that sees what came before, by torch and in blocks, on a CPU.

    Args:
        heads: (of queries, of keys, their width).
    """
    num_heads, num_keys, width = heads
    generator = torch.Generator().manual_seed(0)

    def drawn(num: int) -> torch.Tensor:
        return torch.randn((1, num_tokens, num, width), generator=generator).to(dtype)

    q, k, v = (drawn(num).transpose(1, 2) for num in (num_heads, num_keys, num_keys))
    given = drawn(num_heads)

    def by_torch(*heads: torch.Tensor) -> torch.Tensor:
        q, k, v = heads
        if short_attention.covers(q, k, v):
            return short_attention.attend(q, k, v, is_causal=True)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).contiguous()

    def run(attend: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [one.detach().requires_grad_() for one in (q, k, v)]
        y = attend(*leaves)
        return y, *torch.autograd.grad(y, leaves, given)

    return Pair(lambda: run(by_torch), lambda: run(blockwise_attention.attend))


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


def _of_gated(module: Any, drawn: Any, num_tokens: int) -> Pair:
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
