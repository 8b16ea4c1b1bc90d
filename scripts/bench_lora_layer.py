"""One MLP block with LoRA on 4-bit weights: PEFT and transformers against the kit, in turns.

python scripts/bench_lora_layer.py
python scripts/bench_lora_layer.py --hidden 4096 --width 14336 --tokens 1024

Forward and backward of RMSNorm and a gated MLP in float32, in CPU seconds of one thread, and what
is kept in between, as floats a token. Each round measures all ways one after the other: what
disturbs one disturbs the others. Ratios are of rounds, with their spread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from adapted import adapted
from plainly import Parser, at_least, plainly
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kit.model.fused.attach import fused, plan_fusion
from qlora_kit.model.fused.lean import LeanParts, lean, looking_for_lean_parts
from qlora_kit.model.fused.remade import Origins

Way = Callable[[], AbstractContextManager[object]]


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=at_least(1), default=576)
    parser.add_argument("--width", type=at_least(1), default=1536)
    parser.add_argument("--tokens", type=at_least(1), default=512)
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--rounds", type=at_least(1), default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = of_one_layer(arguments)
    block = model.base_model.model.model.layers[0]
    x = torch.randn(1, arguments.tokens, arguments.hidden, requires_grad=True)

    def run() -> torch.Tensor:
        y: torch.Tensor = block.mlp(block.post_attention_layernorm(x))
        return y

    with looking_for_lean_parts(model) as seen:
        fusion = plan_fusion(model, run)
    parts = seen.parts

    def in_one(parts: LeanParts) -> AbstractContextManager[object]:
        stack, origins = ExitStack(), Origins()
        stack.enter_context(fused(model, fusion, origins))
        stack.enter_context(lean(model, parts, origins))
        return stack

    ways: dict[str, Way] = {
        "peft": nullcontext,
        "LoRA in one": lambda: in_one(LeanParts()),
        "and MLP": lambda: in_one(LeanParts(mlps=parts.mlps)),
        "and norm": lambda: in_one(parts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, way in ways.items():
            with way():
                seconds[name].append(timed(run))
    print(
        f"one block of width {arguments.hidden}, MLP {arguments.width}, {arguments.tokens} tokens, "
        f"r = {arguments.rank}; float32, one thread, {arguments.rounds} rounds"
    )
    print("way            ms   peft / this (spread)   floats kept a token")
    for name, way in ways.items():
        taken = seconds[name][1:]
        ratios = [one / other for one, other in zip(seconds["peft"][1:], taken, strict=True)]
        with way():
            kept = floats_kept(model, run) / arguments.tokens
        print(
            f"{name:12} {1e3 * statistics.median(taken):6.1f}   {statistics.median(ratios):5.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})   {kept:12,.0f}"
        )


def of_one_layer(arguments: argparse.Namespace) -> Any:
    """A Llama of one layer, quantized, with an adapter on all linear layers."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return adapted(folder, arguments.rank)


def timed(run: Callable[[], torch.Tensor]) -> float:
    started = time.process_time()
    run().sum().backward()
    return time.process_time() - started


def floats_kept(model: nn.Module, run: Callable[[], torch.Tensor]) -> float:
    """Of every storage that autograd keeps and the model does not own."""
    owned = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        y = run()
    del y
    return sum(one.untyped_storage().nbytes() for one in held.values()) / 4


if __name__ == "__main__":
    sys.exit(plainly(main))
