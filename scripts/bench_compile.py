"""Layers compiled by `torch.compile` against the same layers as they are, in turns in one process.

python scripts/bench_compile.py
python scripts/bench_compile.py --batch 4 --length 128 --rounds 8

Forward and backward of a whole model (NF4, r = 16 on all linear layers, float32, 40 % of the tokens
supervised, logits for those alone) in CPU seconds of one thread, for each way to compute a layer:
as PEFT and transformers do, with the kit's LoRA as one operation, and with its MLPs and norms as
well. Each round measures a way compiled and as it is, one after the other: what disturbs one
disturbs the other. Ratios are of rounds, with their spread. The first compiled call compiles, and
is told apart; so does the first of each other length.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from adapted import adapted
from plainly import Fault, Parser, plainly
from torch import nn

from qlora_kit.model.demo import demo_model_folder
from qlora_kit.model.fused.attach import plan_fusion
from qlora_kit.model.fused.lean import looking_for_lean_parts
from qlora_kit.train.shortcuts import Shortcuts, taken

SUPERVISED = 0.4
TOLERANCE = 1e-4
"""Relative, between the losses of one way, compiled and as it is."""

Step = Callable[[], torch.Tensor]


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    model = adapted(arguments.model or demo_model_folder(), arguments.rank)
    step = step_of(model, arguments)
    print(arguments)
    print(
        "way             as it is   compiled   as it is / compiled (spread)   first compiled call"
    )
    for name, shortcuts in ways_of(model, step).items():
        with taken(model, shortcuts):
            measure(name, step, model.get_base_model().model.layers, arguments)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; unset: the demo model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of each row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    for name in ("batch", "length", "rank", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.backend not in torch.compiler.list_backends(exclude_tags=()):
        parser.error(f"--backend {arguments.backend} is none of torch.compile's")
    if arguments.model is not None and not arguments.model.is_dir():
        parser.error(f"--model {arguments.model} is no folder")
    return arguments


def step_of(model: Any, arguments: argparse.Namespace) -> Step:
    """The loss of one batch of random tokens."""
    drawn = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=drawn)
    labels = ids.masked_fill(torch.rand(shape, generator=drawn) >= SUPERVISED, -100)

    def step() -> torch.Tensor:
        model.zero_grad()
        loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
        return loss

    return step


def ways_of(model: Any, step: Step) -> dict[str, Shortcuts]:
    """How a layer can be computed; the loss is taken at supervised places in all of them."""
    with looking_for_lean_parts(model) as seen:
        fusion = plan_fusion(model, step)
    return {
        "peft": Shortcuts(supervised_loss=True),
        "LoRA in one": Shortcuts(supervised_loss=True, fusion=fusion),
        "and MLP, norm": Shortcuts(supervised_loss=True, fusion=fusion, lean=seen.parts),
    }


def measure(name: str, step: Step, layers: nn.ModuleList, arguments: argparse.Namespace) -> None:
    """One way, compiled and as it is, round by round; prints its line.

    Raises Fault where the compiled layers' loss is another one.
    """
    torch.compiler.reset()
    compiled = [torch.compile(layer, backend=arguments.backend) for layer in layers]
    _, wanted = timed(step)
    started = time.perf_counter()
    with instead(layers, compiled):
        first, loss = timed(step)
    first_wall = time.perf_counter() - started
    if not abs(loss - wanted) <= TOLERANCE * abs(wanted):
        raise Fault(f"{name}: the loss is {loss:.6f} compiled, and {wanted:.6f} as it is.")
    plain_seconds, compiled_seconds = [], []
    for _ in range(arguments.rounds):
        plain_seconds.append(timed(step)[0])
        with instead(layers, compiled):
            compiled_seconds.append(timed(step)[0])
    ratios = [one / other for one, other in zip(plain_seconds, compiled_seconds, strict=True)]
    as_it_is, with_compiled = map(statistics.median, (plain_seconds, compiled_seconds))
    print(
        f"{name:13} {as_it_is:8.2f} s {with_compiled:8.2f} s {statistics.median(ratios):11.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f}) {first:20.1f} CPU s, {first_wall:.1f} s",
        flush=True,
    )


@contextmanager
def instead(layers: nn.ModuleList, others: Sequence[Any]) -> Iterator[None]:
    """With other modules in the places of a model's layers."""
    own = list(layers)
    try:
        for place, one in enumerate(others):
            layers[place] = one
        yield
    finally:
        for place, one in enumerate(own):
            layers[place] = one


def timed(step: Step) -> tuple[float, float]:
    """(CPU seconds of this process for forward and backward, the loss)"""
    started = time.process_time()
    loss = step()
    loss.backward()
    return time.process_time() - started, float(loss.detach())


if __name__ == "__main__":
    sys.exit(plainly(main))
