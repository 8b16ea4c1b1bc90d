"""Products with frozen weights on a CPU: torch's own against oneDNN's, in its own layout too.

python scripts/bench_products.py
python scripts/bench_products.py --tokens 64 512 2048 --threads 2

For every shape of a model's adapted layers, and its head, x Wᵀ and the gradient g W, in 10⁹
operations a second, each product with another weight, so that all come from memory; then forward
and backward of the whole model as training computes them (NF4, r = 16 on all linear layers,
unpacked weights that stay, 40 % of the tokens supervised), in CPU seconds. The head's x Wᵀ, which
makes the logits, has a line of its own, and the whole model a column where oneDNN computes that
alone. torch's own products are MKL's in float32, as a rule, and oneDNN's in bfloat16, in which the
model's first three columns are the same. `stays` is oneDNN with weights that lie in its own layout.
Each round measures all ways one after the other: what disturbs one disturbs the others. Ratios are
of rounds, with their spread; above 1 oneDNN is faster than torch, and `stays` faster than oneDNN.

python scripts/bench_products.py --precision bf16
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from adapted import adapted
from plainly import Fault, Parser, at_least, plainly
from torch import nn

from qlora_kit.memory.allocator import freed_blocks_kept
from qlora_kit.model.demo import demo_model_folder
from qlora_kit.model.fused.attach import is_lora_layer
from qlora_kit.model.fused.products import (
    BY_ONEDNN,
    BY_TORCH,
    Products,
    reordered,
    why_no_reordered,
)
from qlora_kit.model.fused.residents import Residents
from qlora_kit.recipe import TrainSpec
from qlora_kit.train.shortcuts import choose_shortcuts, taken

SUPERVISED = 0.4
BEYOND_A_CACHE = 1 << 25
"""Bytes of weights."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORT_SECONDS = 0.02
"""What takes less is repeated until it takes as long."""

Sizes = tuple[int, int]
"""Widths of output and input."""


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; unset: the demo model")
    parser.add_argument("--tokens", type=at_least(2), nargs="+", default=[128, 512])
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    arguments = parser.parse_args()
    if arguments.model is not None and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model} is no folder")
    precision = arguments.precision
    why = why_no_reordered(torch.device("cpu"), DTYPES[precision])
    if why is not None:
        raise Fault(f"oneDNN's products cannot be had here: {why}.")
    torch.set_num_threads(arguments.threads)
    model = adapted(arguments.model or demo_model_folder(), arguments.rank)
    print(
        f"{arguments.threads} thread(s), {arguments.rounds} rounds, {precision}, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    ratios = "torch / oneDNN (spread)   oneDNN / stays (spread)"
    print(f"layers  tokens  output × input    torch  oneDNN   stays, 10⁹/s   {ratios}")
    with freed_blocks_kept(True):
        how = (arguments.rounds, DTYPES[precision])
        for sizes, count in sizes_of(model).items():
            for num_tokens in arguments.tokens:
                of_shape(sizes, str(count), num_tokens, *how)
        head = head_of(model)
        for num_tokens in arguments.tokens if head is not None else ():
            sizes = (head.out_features, head.in_features)
            of_shape(sizes, "logits", num_tokens, *how, is_forward=True)
        print()
        print(
            "the whole model, forward and backward, CPU s: torch, logits by oneDNN, oneDNN, stays\n"
            f"{' ' * 62}torch / logits (spread)   {ratios}"
        )
        for num_tokens in arguments.tokens:
            of_model(model, num_tokens, arguments.rounds, precision)


def sizes_of(model: Any) -> Counter[Sizes]:
    """Of all layers with an adapter, and of the head, with how many there are."""
    layers: list[Any] = [one.base_layer for one in model.modules() if is_lora_layer(one)]
    head = head_of(model)
    layers += [head] * (head is not None)
    return Counter((layer.out_features, layer.in_features) for layer in layers)


def head_of(model: Any) -> Any:
    """None where it is no linear layer."""
    head = model.get_base_model().get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def of_shape(
    sizes: Sizes,
    name: str,
    num_tokens: int,
    rounds: int,
    dtype: torch.dtype,
    is_forward: bool = False,
) -> None:
    """Prints the line of one shape, of both directions or of the first alone."""
    height, width = sizes
    x, g = (torch.randn(num_tokens, one).to(dtype) for one in (width, height))
    num = max(BEYOND_A_CACHE // (height * width * dtype.itemsize), 1)
    weights = [(one, one.T) for one in (torch.randn(*sizes).to(dtype) for _ in range(num))]
    blocks = [(reordered(one), reordered(other)) for one, other in weights]

    def run(by: Products, with_weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for one, other in with_weights:
            by.product(x, one)
            if not is_forward:
                by.product(g, other)

    ways: list[Callable[[], None]] = [
        lambda: run(BY_TORCH, weights),
        lambda: run(BY_ONEDNN, weights),
        lambda: run(BY_ONEDNN, blocks),
    ]
    found = [[seconds(way) for way in ways] for _ in range(rounds + 1)][1:]
    operations = (2.0 if is_forward else 4.0) * num_tokens * height * width * num
    rates = [operations / statistics.median(column) / 1e9 for column in zip(*found, strict=True)]
    print(
        f"{name:>6} {num_tokens:7,} {f'{height:,} × {width:,}':>15} "
        + " ".join(f"{rate:7.1f}" for rate in rates)
        + f"   {spread(found, 0):>29} {spread(found, 1):>25}",
        flush=True,
    )


def of_model(model: Any, num_tokens: int, rounds: int, precision: str) -> None:
    """Prints the line of one row of so many tokens."""
    chosen = choose_shortcuts(model, TrainSpec(use_onednn=True), precision, is_sharded=False)
    if not chosen.reorders:
        why = "; ".join(chosen.left) or "the model has no layers for them"
        raise Fault(f"oneDNN's products are not taken: {why}.")
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, num_tokens), generator=drawn)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=drawn) >= SUPERVISED, -100)
    labels[0, -1] = ids[0, -1]
    plain, blocks = Residents(1 << 62), Residents(1 << 62, reordered)
    losses: list[float] = []

    def step(onednn: bool, logits: bool, residents: Residents) -> float:
        model.zero_grad()
        with ExitStack() as stack:
            way = replace(chosen, onednn=onednn, onednn_logits=logits)
            stack.enter_context(taken(model, way, residents))
            stack.enter_context(torch.autocast("cpu", enabled=precision == "bf16"))
            started = time.process_time()
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            took = time.process_time() - started
        losses.append(float(loss.detach()))
        return took

    ways = (
        (False, False, plain),
        (False, chosen.onednn, plain),
        (chosen.onednn, False, plain),
        (chosen.onednn, False, blocks),
    )
    found = [[step(*way) for way in ways] for _ in range(rounds + 1)][1:]
    apart = max(losses) / min(losses) - 1
    if not apart < (1e-4 if precision == "fp32" else 1e-2):
        raise Fault(f"the losses are {apart:.1e} apart: the ways do not compute the same.")
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    print(
        f"{num_tokens:6,} tokens, losses {apart:.0e} apart "
        + " ".join(f"{one:7.2f}" for one in medians)
        + f"   {spread(found, 0):>22} {spread(found, 0, 2):>25} {spread(found, 2):>25}",
        flush=True,
    )


def seconds(way: Callable[[], object]) -> float:
    """Of one time."""
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < SHORT_SECONDS:
        way()
        count += 1
    return (time.perf_counter() - started) / count


def spread(found: Sequence[Sequence[float]], way: int = 0, over: int | None = None) -> str:
    """Median, with the lowest and the highest, of one way over another in each round; unset: over
    the next.
    """
    over = way + 1 if over is None else over
    ratios = [times[way] / times[over] for times in found]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    sys.exit(plainly(main))
