"""The loss of a causal model's head: all logits at once against supervised places in chunks.

python scripts/bench_loss.py
python scripts/bench_loss.py --vocabulary 128256 --hidden 4096 --tokens 2048 --supervised 0.3

Forward and backward to the hidden states in float32, in CPU seconds of one thread, and the bytes of
the largest tensors held at once, as they follow from the shapes. Both ways are measured in each
round, in turns; the two losses have to be the same.
"""

from __future__ import annotations

import statistics
import sys
import time

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
    size = chunk_size(arguments.vocabulary, "cpu")

    def whole(x: torch.Tensor) -> torch.Tensor:
        logits = (x @ weight.T).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def chunks(x: torch.Tensor) -> torch.Tensor:
        is_supervised = labels != IGNORE_INDEX
        return chunked_cross_entropy(
            x[is_supervised], labels[is_supervised], lambda one: one @ weight.T, size
        )

    seconds: dict[str, list[float]] = {"whole": [], "chunks": []}
    losses = {}
    for _ in range(arguments.rounds + 1):
        for name, way in (("whole", whole), ("chunks", chunks)):
            x = hidden.clone().requires_grad_()
            started = time.process_time()
            loss = way(x)
            loss.backward()
            seconds[name].append(time.process_time() - started)
            losses[name] = float(loss.detach())
    ratios = [
        one / other for one, other in zip(seconds["whole"][1:], seconds["chunks"][1:], strict=True)
    ]
    apart = abs(losses["chunks"] / losses["whole"] - 1)
    num_supervised = int((~is_left_out).sum())
    logits = 4 * arguments.vocabulary / 2**20
    print(f"{arguments}; the losses differ by {apart:.1e} of their size")
    for name, rows in (("whole", arguments.tokens), ("chunks", min(size, num_supervised))):
        print(
            f"{name:8} {1e3 * statistics.median(seconds[name][1:]):8.1f} ms   "
            f"logits of {rows:,} places: {rows * logits:,.0f} MiB, and as much for their gradient"
        )
    print(f"whole / chunks {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    sys.exit(plainly(main))
