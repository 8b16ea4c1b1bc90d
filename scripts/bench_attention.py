"""Causal attention on a CPU: torch's kernel for it against blocks of queries.

python scripts/bench_attention.py
python scripts/bench_attention.py --heads 32 8 128 --tokens 256 1024 --precision bf16

Forward and backward of one example of each length: milliseconds, and how far outputs and gradients
are apart. Then forward and backward of the whole model as training computes them (NF4, r = 16 on
all linear layers, unpacked weights that stay, 40 % of the tokens supervised), in float32 on one row
of several examples of such a length, in CPU seconds. Each round measures both ways one after the
other: what disturbs one disturbs the other. Ratios are of rounds, with their spread; above 1 blocks
are faster. In bfloat16 torch's side is what the kit takes otherwise (docs/performance.md,
"attention of short examples").
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from adapted import adapted
from bench_products import SUPERVISED, seconds, spread
from plainly import Fault, Parser, at_least, plainly

from qlora_kit.memory.allocator import begin_with_a_tidy_heap, freed_blocks_kept
from qlora_kit.model.blockwise_attention import covers
from qlora_kit.model.by_example import attending_by_example
from qlora_kit.model.demo import demo_model_folder
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.heads import heads_of
from qlora_kit.recipe import TrainSpec
from qlora_kit.train.kernel_race import attention_pair, raced_on_a_cpu
from qlora_kit.train.shortcuts import choose_shortcuts, taken

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; unset: the demo model")
    parser.add_argument(
        "--heads",
        type=at_least(1),
        nargs=3,
        metavar=("QUERIES", "KEYS", "WIDTH"),
        help="in place of the model's, whose whole pass is then left out",
    )
    parser.add_argument("--tokens", type=at_least(2), nargs="+", default=[192, 256, 512])
    parser.add_argument("--row", type=at_least(2), default=512, help="tokens of the model's row")
    parser.add_argument("--precision", choices=sorted(_DTYPES), default="fp32")
    parser.add_argument("--rounds", type=at_least(1), default=7)
    parser.add_argument("--threads", type=at_least(1), default=1)
    arguments = parser.parse_args()
    if arguments.model is not None and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model} is no folder")
    torch.set_num_threads(arguments.threads)
    dtype = _DTYPES[arguments.precision]
    model = None if arguments.heads else adapted(arguments.model or demo_model_folder(), rank=16)
    heads = tuple(arguments.heads) if model is None else heads_of(model)
    if heads is None:
        raise Fault(f"{arguments.model} does not say how many heads it has: give --heads.")
    if heads[0] % heads[1]:
        raise Fault(f"{heads[0]} heads of queries are no multiple of {heads[1]} heads of keys.")
    print(
        f"{arguments.threads} thread(s), {arguments.rounds} rounds, {arguments.precision}, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    print(f"heads of {heads[2]}: {heads[0]}, of keys {heads[1]}")
    print("tokens    apart   torch ms  blocks ms   torch / blocks (spread)")
    for num_tokens in arguments.tokens:
        of_length(heads, num_tokens, dtype, arguments.rounds)
    print()
    if model is None or arguments.precision != "fp32":
        print("the whole model is timed in fp32, without --heads")
        return
    print("the whole model, forward and backward   torch  blocks, CPU s   torch / blocks (spread)")
    for num_tokens in arguments.tokens:
        of_model(model, num_tokens, max(arguments.row // num_tokens, 1), arguments.rounds)


def of_length(
    heads: tuple[int, int, int], num_tokens: int, dtype: torch.dtype, rounds: int
) -> None:
    """Prints the line of one length."""
    pair = attention_pair(heads, num_tokens, dtype)
    apart = raced_on_a_cpu(pair).apart
    found = [(seconds(pair.by_torch), seconds(pair.by_other)) for _ in range(rounds)]
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*found, strict=True))
    query = torch.empty(1, heads[0], num_tokens, heads[2], dtype=dtype)
    note = "" if covers(query, *[query[:, : heads[1]]] * 2) else "   (not taken by itself)"
    print(f"{num_tokens:6,} {apart:8.0e} {ours:10.2f} {theirs:10.2f}   {spread(found):>23}{note}")


def of_model(model: Any, num_tokens: int, num_examples: int, rounds: int) -> None:
    """Prints the line of one row of so many examples, each of that length."""
    chosen = choose_shortcuts(model, TrainSpec(), "fp32", is_sharded=False)
    drawn = torch.Generator().manual_seed(0)
    shape = (1, num_tokens * num_examples)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=drawn)
    labels = ids.masked_fill(torch.rand(shape, generator=drawn) >= SUPERVISED, -100)
    labels[0, -1] = ids[0, -1]
    positions = torch.arange(num_tokens).repeat(num_examples)[None]
    residents = Residents(1 << 62)
    losses: list[float] = []

    def step(is_blockwise: bool) -> float:
        model.zero_grad()
        base = model.get_base_model()
        with (
            taken(model, chosen, residents),
            attending_by_example(base, is_blockwise=is_blockwise),
        ):
            started = time.process_time()
            loss = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).loss
            loss.backward()
            took = time.process_time() - started
        losses.append(float(loss.detach()))
        return took

    with freed_blocks_kept(True):
        found = [[step(False), step(True)] for _ in range(rounds + 1)][1:]
    apart = max(losses) / min(losses) - 1
    if not apart < 1e-4:
        raise Fault(f"the losses are {apart:.1e} apart: the ways do not compute the same.")
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    row = f"{num_examples} × {num_tokens:,} tokens"
    print(
        f"{row}, losses {apart:.0e} apart {medians[0]:12.2f} {medians[1]:7.2f}"
        f"   {spread(found):>29}"
    )


if __name__ == "__main__":
    begin_with_a_tidy_heap()
    sys.exit(plainly(main))
