"""What a graph in 8 bits has to compute, in floats and without ONNX Runtime.

https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: `value = scale *
(q - zero_point)`; activations in 0 … 255 over one range of the whole tensor that holds zero,
weights in −64 … 64 or −127 … 127 with one scale for each output. Nothing of it can saturate here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_kit.data.sequences import TokenSequence

REDUCED, WHOLE = 64, 127  # the largest integer of a weight, in 7 and in 8 bits
ACTIVATION_STEPS = 255

Ranges = Mapping[str, tuple[float, float]]


def rounded_to_8_bits(
    model: PreTrainedModel,
    names: Sequence[str],
    ranges: Ranges | None = None,
    largest: int = REDUCED,
) -> PreTrainedModel:
    """The model with these layers rounded, in place; without ranges each tensor has its own."""
    for name in names:
        layer = model.get_submodule(name)
        _round_weight(layer, largest)
        fixed = None if ranges is None else ranges[name]

        def round_input(layer: nn.Module, given: Any, fixed: Any = fixed) -> Any:
            return (_rounded(given[0], *(fixed or _range(given[0]))), *given[1:])

        layer.register_forward_pre_hook(round_input)
    return model


def observed_ranges(
    model: PreTrainedModel, names: Sequence[str], sequences: Sequence[TokenSequence]
) -> Ranges:
    """The least and the largest number that each layer is given in all of the text."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, given, found=seen[name]: found.append(_range(given[0]))
        )
        for name in names
    ]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence.input_ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        name: (min(low for low, _ in found), max(high for _, high in found))
        for name, found in seen.items()
    }


def _range(inputs: torch.Tensor) -> tuple[float, float]:
    return min(inputs.min().item(), 0.0), max(inputs.max().item(), 0.0)


def _rounded(inputs: torch.Tensor, low: float, high: float) -> torch.Tensor:
    scale = (high - low) / ACTIVATION_STEPS
    zero_point = round(-low / scale)
    q = torch.clamp(torch.round(inputs / scale) + zero_point, 0, ACTIVATION_STEPS)
    return (q - zero_point) * scale


def _round_weight(layer: nn.Module, largest: int) -> None:
    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    rounded = torch.round(weight / scale) * scale
    layer.weight.data = (rounded.T if isinstance(layer, Conv1D) else rounded).contiguous()
