"""What quantization-aware training costs beside plain QLoRA, in one decoder layer.

    python scripts/bench_qat.py [--tokens 400] [--hidden 576] [--inner 1536]

Prints milliseconds of each side and their ratio: the linear layers of one Llama-like decoder layer
with LoRA of rank 16, on an NF4 base (QLoRA), on a 32-bit base, and with the merged weights
quantized at every update, where they are quantized anew (the first micro-batch of an update) and
where they are held (the others, and the recomputation of gradient checkpointing).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from plainly import Parser, at_least, plainly
from torch import nn

from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.qat.linear import FakeQuantization, QuantizedLora
from qlora_kit.model.qat.nf4 import Nf4, quantize_on_cpu
from qlora_kit.recipe import QuantizationAwareSpec

REPETITIONS = 9


def layers(hidden: int, inner: int, quantized: bool) -> nn.ModuleList:
    """q, k, v, o, gate, up and down, with LoRA on each."""
    torch.manual_seed(0)
    small = hidden // 3
    shapes = [
        (hidden, hidden), (hidden, small), (hidden, small), (hidden, hidden),
        (hidden, inner), (hidden, inner), (inner, hidden),
    ]  # fmt: skip
    # Behind `plainly`, which hushes what is logged, wherever a bench imports that.
    from peft import LoraConfig, inject_adapter_in_model

    made = nn.ModuleList()
    for num_in, num_out in shapes:
        linear: nn.Module = nn.Linear(num_in, num_out, bias=False)
        if quantized:
            packed = bnb.nn.Linear4bit(
                num_in, num_out, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            packed.support_avx512bf16_for_cpu = False
            packed.load_state_dict(linear.state_dict())
            linear = packed.to("cpu")
        holder = nn.Module()
        holder.layer = linear
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["layer"], init_lora_weights=False)
        inject_adapter_in_model(config, holder)
        made.append(holder.layer)
    return made


def aware(plain: nn.ModuleList, method: str) -> nn.ModuleList:
    spec = QuantizationAwareSpec.model_validate({"method": method})
    seen = Aware(spec, torch.float32)
    shared = FakeQuantization(seen, seen.scheme(), torch.float32)
    made = nn.ModuleList()
    for layer in plain:
        made.append(QuantizedLora(layer, shared))
    return made


def step(chain: nn.ModuleList, tokens: int, fresh: bool) -> Callable[[], None]:
    inputs = {
        layer.in_features: torch.randn(tokens, layer.in_features, requires_grad=True)
        for layer in chain
    }

    def run() -> None:
        for layer in chain:
            if fresh:  # as after an update
                with torch.no_grad():
                    layer.lora_B["default"].weight.add_(1e-6)
            layer(inputs[layer.in_features]).sum().backward()

    return run


def milliseconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--tokens", type=at_least(1), default=400)
    parser.add_argument("--hidden", type=at_least(1), default=576)
    parser.add_argument("--inner", type=at_least(1), default=1536)
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {asked.tokens} tokens, median of {REPETITIONS}")

    qlora = milliseconds(step(layers(asked.hidden, asked.inner, True), asked.tokens, True))
    plain = layers(asked.hidden, asked.inner, False)
    lora = milliseconds(step(plain, asked.tokens, True))
    print(f"QLoRA, NF4 base            {qlora:8.1f} ms")
    print(f"LoRA, 32-bit base          {lora:8.1f} ms  {lora / qlora:5.2f} × QLoRA")
    for method in ("nf4", "int8", "int4-group"):
        for fresh in (True, False):
            took = milliseconds(step(aware(plain, method), asked.tokens, fresh))
            what = f"aware of {method}, {'anew' if fresh else 'held'}"
            print(f"{what:<26} {took:8.1f} ms  {took / qlora:5.2f} × QLoRA")

    weight = torch.randn(asked.inner, asked.hidden)
    mine = milliseconds(lambda: quantize_on_cpu(weight, 64))
    theirs = milliseconds(
        lambda: bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    )
    codes = Nf4(64, True).quantize(weight)
    back = milliseconds(lambda: codes.dense(torch.float32))
    print(f"\nNF4 of {weight.numel() / 1e6:.2f} M weights:")
    print(f"by table                   {mine:8.2f} ms")
    print(f"by bitsandbytes            {theirs:8.2f} ms  {theirs / mine:5.2f} × by table")
    print(f"dequantized                {back:8.2f} ms")


if __name__ == "__main__":
    sys.exit(plainly(main))
