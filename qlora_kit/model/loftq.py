"""Start an adapter at the quantization error, LoftQ (arXiv:2310.08659) with one step.

The base stays as it is, so the adapter remains a plain one for the plain 4-bit base: A and B are
the best rank-r fit of W - dequantize(quantize(W)), by singular value decomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import AdapterError
from qlora_kit.model.quantized import is_quantized
from qlora_kit.model.scan import iterate_tensors
from qlora_kit.model.stored import match_names
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.model.weights import readable_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from qlora_kit.model.base import Base


def fit_to_quantization_error(model: PeftModel, base: Base) -> None:
    """Set every adapter pair on a quantized module so that base + update comes closest to the
    16-bit weight; the others keep the start that they have.

    Raises:
        AdapterError: the checkpoint does not hold the 16-bit weight of an adapted module.
    """
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    layers: dict[str, LoraLayer] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and is_quantized(module.get_base_layer()):
            layers[f"{name}.weight"] = module
    # Pickles may be read here if they might when the base was loaded, or it would not be.
    weights = readable_weights(base.source.folder, allow_pickle=True)
    names = weights.tensors or [name for name, _ in iterate_tensors(weights.files)]
    parameters = match_names(base.skeleton, names).parameters
    for name, weight in iterate_tensors(weights.files):
        parameter = parameters.get(name, name)
        layer = layers.pop(parameter, None)
        if layer is None:
            continue
        module_name = parameter.rpartition(".")[0]
        turned = isinstance(base.skeleton.model.get_submodule(module_name), Conv1D)
        _fit(parameter, layer, weight.T if turned else weight)
    if layers:
        raise AdapterError(
            f"lora.init: loftq needs the 16-bit weights, and the checkpoint has none for "
            f"{next(iter(layers))}; use init: default."
        )


def _fit(name: str, layer: LoraLayer, weight: torch.Tensor) -> None:
    kept = dequantized_weight(layer.get_base_layer())
    if weight.shape != kept.shape or not weight.is_floating_point():
        raise AdapterError(
            f"lora.init: loftq needs the 16-bit weight of {name}, and the checkpoint holds it "
            f"as {weight.dtype} {tuple(weight.shape)}; use init: default."
        )
    (adapter,) = layer.lora_A.keys()
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    u, s, vh = torch.linalg.svd(weight.to(kept) - kept, full_matrices=False)
    rank = min(a.shape[0], s.shape[0])  # what lies beyond starts as it was, times zero
    root = (s[:rank] / layer.scaling[adapter]).sqrt()
    with torch.no_grad():
        a[:rank] = root[:, None] * vh[:rank]
        b.zero_()
        b[:, :rank] = u[:, :rank] * root
