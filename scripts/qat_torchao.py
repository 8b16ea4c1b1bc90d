"""What torchao's fake quantization would train, beside the weights that are shipped.

    python scripts/qat_torchao.py

Over every tenth linear layer of the demo model, for int8 (a scale for each row) and int4 (a scale
for each 64 inputs): the share of weights that torchao rounds to another number than the exported
checkpoint holds, the share whose gradient it clips to zero, and the bytes that one layer keeps
for the backward pass, as a multiple of its weight's.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torchao.quantization.granularity import PerAxis
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.linear import FakeQuantizedLinear

from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.qat.linear import FakeQuantization, QuantizedLinear
from qlora_kit.model.source import resolve_source
from qlora_kit.recipe import QuantizationAwareSpec

EVERY = 10
NUM_TOKENS = 16
CONFIGS = {
    "int8": {"dtype": torch.int8, "granularity": PerAxis(0)},
    "int4-group": {"dtype": torch.int4, "group_size": 64},  # type: ignore[attr-defined]
}


def main() -> None:
    folder = resolve_source("demo/smollm2-135m-instruct").folder
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        names = list(file.keys())
        names = [name for name in names if name.endswith("_proj.weight")][::EVERY]
        weights = [file.get_tensor(name).float() for name in names]
    print("| method | other number | no gradient | kept: torchao | kept: here |")
    print("|---|---|---|---|---|")
    for method in CONFIGS:
        counts = torch.tensor([compared(method, weight) for weight in weights])
        total = sum(weight.numel() for weight in weights)
        other, clipped = (counts[:, :2].sum(dim=0) / total).tolist()
        theirs, here = (counts[:, 2:].sum(dim=0) / (4 * total)).tolist()
        print(f"| {method} | {other:.2%} | {clipped:.2%} | {theirs:.2f} | {here:.2f} |")


def compared(method: str, weight: torch.Tensor) -> tuple[float, float, float, float]:
    """Weights on another number, weights without a gradient, bytes kept by torchao and here."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    config: Any = IntxFakeQuantizeConfig(**CONFIGS[method], is_symmetric=True)
    theirs = FakeQuantizedLinear.from_linear(layer, weight_config=config)
    theirs.weight = layer.weight
    seen = Aware(
        QuantizationAwareSpec.model_validate({"method": method, "train": "full"}), torch.float32
    )
    shared = FakeQuantization(seen, seen.scheme(), torch.float32)
    difference = theirs.weight_fake_quantizer(weight) - shared.quantize(weight).dense(torch.float32)
    kept = [bytes_kept(one) for one in (theirs, QuantizedLinear(layer, shared))]
    layer.weight.grad = None
    theirs(torch.ones(1, weight.shape[1])).sum().backward()
    assert layer.weight.grad is not None
    num_other = int((difference.abs() > 1e-6 * weight.abs().max()).sum())
    return num_other, int((layer.weight.grad == 0).sum()), *kept


def bytes_kept(layer: nn.Module) -> int:
    """Of tensors that a forward pass saves for the backward pass, other than parameters."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.ones(NUM_TOKENS, layer.in_features, requires_grad=True))
    return sum(kept.values())


if __name__ == "__main__":
    main()
