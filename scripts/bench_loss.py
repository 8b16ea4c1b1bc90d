"""The loss of a causal model's head: all logits at once against supervised places in chunks.

python scripts/bench_loss.py
python scripts/bench_loss.py --vocabulary 128256 --hidden 2048 --tokens 1024 --places 64 128 256 512

Forward and backward to the hidden states in float32, in CPU seconds of one thread, and the bytes of
the largest tensors held at once, as they follow from the shapes. All ways are measured in each
round, in turns; their losses have to be the same.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from plainly import Parser, at_least, plainly
from torch.nn import functional as F

from qlora_kit.data.sequences import IGNORE_INDEX
from qlora_kit.train.supervised_loss import chunk_size, chunked_cross_entropy


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=at_least(1), default=49152)
    parser.add_argument("--hidden", type=at_least(1), default=576)
    parser.add_argument("--tokens", type=at_least(1), default=512)
    parser.add_argument("--supervised", type=float, default=0.4, help="share of the tokens")
    parser.add_argument(
        "--places",
        type=at_least(1),
        nargs="+",
        help="of a chunk, at most; unset: as training has it",
    )
    parser.add_argument("--rounds", type=at_least(1), default=7)
    arguments = parser.parse_args()
    if not 0 < arguments.supervised <= 1:
        parser.error(f"--supervised must be above 0 and at most 1, got {arguments.supervised:g}")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(arguments.vocabulary, arguments.hidden, generator=generator) * 0.02
    hidden = torch.randn(arguments.tokens, arguments.hidden, generator=generator)
    labels = torch.randint(0, arguments.vocabulary, (arguments.tokens,), generator=generator)
    is_left_out = torch.rand(arguments.tokens, generator=generator) >= arguments.supervised
    labels = labels.masked_fill(is_left_out, IGNORE_INDEX)
    sizes = list(dict.fromkeys(arguments.places or [chunk_size(arguments.vocabulary, "cpu")]))
    is_supervised = ~is_left_out

    def whole(x: torch.Tensor) -> torch.Tensor:
        logits = (x @ weight.T).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def chunks(x: torch.Tensor, size: int) -> torch.Tensor:
        return chunked_cross_entropy(
            x[is_supervised], labels[is_supervised], lambda one: one @ weight.T, size
        )

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"all logits": whole}
    ways |= {f"{size:,} places": partial(chunks, size=size) for size in sizes}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            x = hidden.clone().requires_grad_()
            started = time.process_time()
            loss = way(x)
            loss.backward()
            seconds[name].append(time.process_time() - started)
            losses[name] = float(loss.detach())
    apart = max(abs(one / losses["all logits"] - 1) for one in losses.values())
    num_supervised = int(is_supervised.sum())
    print(
        f"{arguments.hidden:,} × {arguments.vocabulary:,}, {arguments.tokens:,} tokens, "
        f"{num_supervised:,} of them supervised; the losses differ by {apart:.1e} of their size"
    )
    parts = [math.ceil(num_supervised / math.ceil(num_supervised / size)) for size in sizes]
    for name, rows in zip(ways, (arguments.tokens, *parts), strict=True):
        mebibytes = 4 * arguments.vocabulary * rows / 2**20
        ratios = [
            one / other
            for one, other in zip(seconds["all logits"][1:], seconds[name][1:], strict=True)
        ]
        print(
            f"{name:14} {1e3 * statistics.median(seconds[name][1:]):8.1f} ms   "
            f"{mebibytes:7,.0f} MiB of logits, and as much for their gradient   all logits : this "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )


if __name__ == "__main__":
    sys.exit(plainly(main))
