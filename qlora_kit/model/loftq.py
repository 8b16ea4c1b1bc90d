"""Start an adapter at the quantization error, LoftQ (arXiv:2310.08659) with one step.

The base stays as it is, so the adapter remains a plain one for the plain 4-bit base: A and B are
the best rank-r fit of W - dequantize(quantize(W)), by singular value decomposition.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import AdapterError
from qlora_kit.model.scan import iterate_tensors, weight_files
from qlora_kit.model.weight import dequantized_weight

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def fit_to_quantization_error(model: PeftModel, folder: Path) -> None:
    """Set every adapter pair so that base + update comes closest to the 16-bit weight.

    Raises:
        AdapterError: the folder does not hold the 16-bit weight of an adapted module.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, LoraLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            layers[f"{name}.weight"] = module
    for name, weight in iterate_tensors(weight_files(folder)):
        layer = layers.pop(name, None)
        if layer is not None:
            _fit(name, layer, weight)
    if layers:
        raise AdapterError(
            f"lora.init: loftq needs the 16-bit weights, and the checkpoint has none for "
            f"{next(iter(layers))}; use init: default."
        )


def _fit(name: str, layer: LoraLayer, weight: torch.Tensor) -> None:
    base = layer.get_base_layer()
    kept = dequantized_weight(base)
    original = weight.to(kept)
    if original.shape != kept.shape and original.T.shape == kept.shape:
        original = original.T
    if original.shape != kept.shape or not weight.is_floating_point():
        raise AdapterError(
            f"lora.init: loftq needs the 16-bit weight of {name}, and the checkpoint holds it "
            f"as {weight.dtype} {tuple(weight.shape)}; use init: default."
        )
    (adapter,) = layer.lora_A.keys()
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    rank, scaling = a.shape[0], layer.scaling[adapter]
    u, s, vh = torch.linalg.svd(original - kept, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    with torch.no_grad():
        a.copy_(root[:, None] * vh[:rank])
        b.copy_(u[:, :rank] * root)
