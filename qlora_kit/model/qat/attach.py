"""Make a model compute with the quantized weights that it will be shipped with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import AdapterError, ModelError
from qlora_kit.model.skeleton import is_linear, name_matches, text_modules
from qlora_kit.recipe import QuantizationAwareSpec

if TYPE_CHECKING:
    from qlora_kit.model.qat.aware import Aware
    from qlora_kit.model.qat.linear import FakeQuantization
    from qlora_kit.model.skeleton import Skeleton


def quantized_in_training(skeleton: Skeleton, spec: QuantizationAwareSpec) -> tuple[str, ...]:
    """The linear modules that are quantized: all but the head, and those to be skipped."""
    skips = (*spec.skip_modules, *(skeleton.model._keep_in_fp32_modules or ()))
    return tuple(name for name in skeleton.linear_modules if not name_matches(name, skips))


def trained_in_full(skeleton: Skeleton) -> tuple[str, ...]:
    """The linear modules whose weights `train: full` trains: those that all-linear would adapt."""
    left_out = {
        *skeleton.router_modules,
        *skeleton.foreign_linear_modules,
        *skeleton.read_directly,
    }
    of_text = {name for name, _ in text_modules(skeleton.model)} - left_out
    return tuple(name for name in skeleton.linear_modules if name in of_text)


def refuse_unaware(skeleton: Skeleton, spec: QuantizationAwareSpec) -> None:
    """What could not be quantized so, before any weight is read.

    Raises:
        ModelError: fused experts, linear layers of a foreign class, a skip that skips nothing, or
            layers that the method cannot take.
    """
    model, kind = skeleton.model, skeleton.model.config.model_type
    if skeleton.expert_parameters:
        raise ModelError(
            f"{kind} keeps its experts in fused tensors ({skeleton.expert_parameters[0]}), which "
            "quantization_aware would leave unquantized; take a dense model."
        )
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    for skip in spec.skip_modules:
        if not any(name_matches(name, (skip,)) for name in linear):
            raise ModelError(
                f"quantization_aware.skip_modules: {skip} is neither the start nor the end of a "
                f"linear layer's name; one of them is {linear[0]}."
            )
    names = quantized_in_training(skeleton, spec)
    if not names:
        raise ModelError("quantization_aware: no linear layer is left to be quantized.")
    for name in names:
        why = _fault(skeleton, spec, name)
        if why:
            leaf = name.rpartition(".")[2]
            raise ModelError(
                f"quantization_aware: {name} {why}; name it in quantization_aware.skip_modules "
                f"({leaf}), or take another method."
            )


def _fault(skeleton: Skeleton, spec: QuantizationAwareSpec, name: str) -> str:
    """Why a layer cannot be quantized so; empty where it can."""
    from transformers.pytorch_utils import Conv1D

    module: Any = skeleton.model.get_submodule(name)
    if name in skeleton.foreign_linear_modules or name in skeleton.read_directly:
        return f"is a {type(module).__name__} whose weight is read past the layer"
    if spec.method != "nf4" and isinstance(module, Conv1D):
        return f"is a Conv1D, which {spec.method} checkpoints cannot hold"
    if spec.method == "int4-group" and module.in_features % spec.group_size:
        return f"has {module.in_features} inputs, no multiple of group_size ({spec.group_size})"
    return ""


def make_aware(
    model: nn.Module, skeleton: Skeleton, aware: Aware | None, compute_dtype: torch.dtype
) -> None:
    """Put quantized layers in place of the model's own, with the same parameters in them.

    model: with LoRA layers on it, or copies that are trained in full, or without. Nothing is done
    where `aware` is None.

    Raises:
        AdapterError: what is trained in full would be quantized.
    """
    if aware is None:
        return
    from peft.utils import ModulesToSaveWrapper

    from qlora_kit.model.qat.linear import FakeQuantization

    shared = FakeQuantization(aware, aware.scheme(), compute_dtype)
    for name in quantized_in_training(skeleton, aware.spec):
        layer = model.get_submodule(name)
        if not isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, _quantized(layer, shared))
        elif aware.spec.train == "full":
            layer.original_module = _quantized(layer.original_module, shared)
            for adapter, copy in layer.modules_to_save.items():
                layer.modules_to_save[adapter] = _quantized(copy, shared)
        else:
            raise AdapterError(
                f"lora.modules_to_save: {name} is trained in full and quantized; name it in "
                "quantization_aware.skip_modules as well, or set quantization_aware.train: full."
            )


def _quantized(layer: nn.Module, shared: FakeQuantization) -> nn.Module:
    """The layer that computes as this one, with quantized weights."""
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    from qlora_kit.model.qat.linear import QuantizedConv1D, QuantizedLinear, QuantizedLora

    if isinstance(layer, lora.Linear):
        return QuantizedLora(layer, shared)
    if isinstance(layer, Conv1D):
        return QuantizedConv1D(layer, shared)
    assert isinstance(layer, nn.Linear), type(layer)
    return QuantizedLinear(layer, shared)


def fake_quantization_of(model: nn.Module) -> FakeQuantization | None:
    """What the quantized layers of a model share; None where it has none."""
    return next(_shared(model), None)


def aware_record(model: nn.Module) -> dict[str, Any] | None:
    """For the manifest of what is saved of the model."""
    shared = fake_quantization_of(model)
    return None if shared is None else shared.aware.record()


def _shared(model: nn.Module) -> Iterator[FakeQuantization]:
    from qlora_kit.model.qat.linear import QuantizedConv1D, QuantizedLinear, QuantizedLora

    for module in model.modules():
        if isinstance(module, QuantizedLora | QuantizedLinear | QuantizedConv1D):
            yield module.shared
