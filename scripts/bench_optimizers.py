"""Optimizers on this machine: what an update takes, and what it keeps.

python scripts/bench_optimizers.py
python scripts/bench_optimizers.py --optimizers adamw_torch_fused paged_adamw_8bit --rank 64

Each is made as the Trainer makes it and moves the same adapter of the demo model (on all linear
layers) by the same gradients. Every round times an update of each, one after the other; printed are
milliseconds, the bytes of state for each trained number, and ratios of rounds against the first,
with their spread: above 1 the first is faster. On a GPU the device is waited for.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from adapted import adapted
from plainly import Parser, at_least, existing_folder, plainly

from qlora_kit.model.demo import demo_model_folder
from qlora_kit.recipe.train import Optimizer

_COMPARED = ("adamw_torch_fused", "adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit")
_GRADIENT = 1e-3  # the size of its numbers, which no optimizer's time depends on
_KNOWN = tuple(name for name in get_args(Optimizer) if name != "auto")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=existing_folder, help="a folder; unset: the demo model")
    parser.add_argument(
        "--optimizers", nargs="+", choices=_KNOWN, default=list(_COMPARED), metavar="NAME"
    )
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--rounds", type=at_least(1), default=15)
    parser.add_argument("--threads", type=at_least(1), default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On a CPU paged optimizers run unpaged.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    model = adapted(str(arguments.model or demo_model_folder()), arguments.rank)
    shapes = [one.shape for one in model.parameters() if one.requires_grad]
    del model
    trained = {name: parameters_of(shapes, device) for name in arguments.optimizers}
    made = {name: optimizer_of(name, trained[name]) for name in trained}
    count = sum(shape.numel() for shape in shapes)
    print(
        f"{count / 1e6:.1f} million numbers in {len(shapes)} tensors, {device}, "
        f"{arguments.threads} thread{'s' * (arguments.threads > 1)}"
    )
    for name, optimizer in made.items():  # the first makes the state
        updated(optimizer, trained[name], seed=0, device=device)
    found = [
        [
            updated(optimizer, trained[name], seed=number, device=device)
            for name, optimizer in made.items()
        ]
        for number in range(1, arguments.rounds + 1)
    ]
    show(list(made), found, [state_bytes(one) / count for one in made.values()])


def parameters_of(shapes: Sequence[torch.Size], device: str) -> list[torch.nn.Parameter]:
    """The same for every optimizer, in float32."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes
    ]


def optimizer_of(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """As the Trainer makes it."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory(prefix="bench-optimizers-") as folder:
        arguments = TrainingArguments(output_dir=str(Path(folder)), optim=name, report_to="none")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made: Any = kind(parameters, **settings)
    return made


def updated(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    *,
    seed: int,
    device: str,
) -> float:
    """Seconds of one update, whose gradients are there before."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (_GRADIENT * drawn).to(device)
    waited_for(device)
    started = time.perf_counter()
    optimizer.step()
    waited_for(device)
    taken = time.perf_counter() - started
    optimizer.zero_grad(set_to_none=True)
    return taken


def waited_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors that it keeps."""
    kept = (one for state in optimizer.state.values() for one in state.values())
    return sum(one.nbytes for one in kept if isinstance(one, torch.Tensor))


def show(names: Sequence[str], found: Sequence[Sequence[float]], each: Sequence[float]) -> None:
    """A line of each."""
    print(f"{'':24} ms an update   bytes a number   against {names[0]}")
    for place, name in enumerate(names):
        times = [row[place] for row in found]
        ratios = [row[place] / row[0] for row in found]
        spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
        print(
            f"{name:24} {1e3 * statistics.median(times):12.1f}   {each[place]:14.2f}   "
            f"{'' if place == 0 else spread}".rstrip()
        )


if __name__ == "__main__":
    sys.exit(plainly(main))
