"""What of a loaded model is really quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.recipe import QuantizationSpec

# By name: importing bitsandbytes takes seconds, and an unquantized model does without.
_QUANTIZED_WEIGHTS = ("Params4bit", "Int8Params")


@dataclass(frozen=True)
class Quantized:
    """What share of a model is really quantized; parameters counted as they are, not as packed."""

    num_parameters: int
    num_quantized: int
    weight_bytes: int

    @property
    def share(self) -> float:
        return self.num_quantized / self.num_parameters


def count_quantized(model: nn.Module) -> Quantized:
    """Count parameters as they are: two packed ones in each byte of a 4-bit weight."""
    total = quantized = num_bytes = 0
    parameter: Any
    for parameter in model.parameters():
        count = parameter.numel()
        num_bytes += parameter.numel() * parameter.element_size()
        if is_four_bit(parameter):
            count = parameter.quant_state.shape.numel()
            beside = quant_state_tensors(parameter.quant_state)
            num_bytes += sum(one.numel() * one.element_size() for one in beside)
        if is_four_bit(parameter) or type(parameter).__name__ in _QUANTIZED_WEIGHTS:
            quantized += count
        total += count
    return Quantized(total, quantized, num_bytes)


def is_four_bit(parameter: Any) -> bool:
    """Whether a tensor is packed, which is told by what is kept beside it."""
    return type(getattr(parameter, "quant_state", None)).__name__ == "QuantState"


def is_quantized(module: Any) -> bool:
    """Whether a module keeps its weight in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in _QUANTIZED_WEIGHTS


def four_bit_modules(model: nn.Module) -> Iterator[Any]:
    """The modules whose weight is packed in 4 bits."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            yield module


def eight_bit_scale(module: Any) -> torch.Tensor | None:
    """Of the rows of a weight in 8 bits, which bitsandbytes hands from the weight to the module's
    state in the first forward pass; None: it is in other bits.
    """
    if type(module).__name__ != "Linear8bitLt":
        return None
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:  # a layer of PEFT's, around one
        return None
    scale: torch.Tensor = module.state.SCB if weight.SCB is None else weight.SCB
    return scale


def never_repacked(model: nn.Module) -> None:
    """Turn off what bitsandbytes does on a CPU with AVX512-BF16 in evaluation: it repacks the
    weights in place, which nothing undoes before the next training step or a merge, and computes
    in bfloat16 whatever dtype was asked for.
    """
    for module in four_bit_modules(model):
        module.support_avx512bf16_for_cpu = False


def require_quantized(
    model: PreTrainedModel, quantization: QuantizationSpec, bits: Mapping[str, int]
) -> Quantized:
    """Fail when a linear layer is not in the bits it should be in, or has another shape.

    `bits` are 4 or 8 by the name of every module that should be quantized, and of no other.

    Raises:
        ModelError: names the layers.
    """
    counted = count_quantized(model)
    if not quantization.is_quantized:
        return counted
    missed = []
    for name, wanted in bits.items():
        module = model.get_submodule(name)
        if not is_quantized(module):
            missed.append(name)
            continue
        _require_bits(name, module, wanted)
        _require_shape(name, module)
        _require_kind(name, module, quantization)
    if missed:
        more = " …" if len(missed) > 3 else ""
        raise ModelError(
            f"{len(missed)} linear layers were left unquantized ({', '.join(missed[:3])}{more}). "
            "Name them in quantization.skip_modules if that is meant."
        )
    if counted.num_quantized == 0:
        raise ModelError(
            "nothing was quantized: the model has no linear layer that bitsandbytes handles. "
            "Load it in 16 bits with quantization.load_in_4bit: false."
        )
    quantized = [name for name, module in model.named_modules() if is_quantized(module)]
    extra = [name for name in quantized if name not in bits]
    if extra and quantization.overrides:
        raise ModelError(f"{', '.join(extra[:3])} was quantized, and should not be.")
    return counted


def _require_bits(name: str, module: Any, wanted: int) -> None:
    found = 4 if is_four_bit(module.weight) else 8
    if found != wanted:
        raise ModelError(f"{name} was loaded in {found} bits, and {wanted} were asked for.")


def _require_shape(name: str, module: Any) -> None:
    weight = module.weight
    shape = tuple(weight.quant_state.shape if is_four_bit(weight) else weight.shape)
    wanted = (module.out_features, module.in_features)
    if shape != wanted:
        raise ModelError(
            f"{name} was loaded in shape {list(shape)}, and config.json describes {list(wanted)}: "
            "the checkpoint and its config.json do not belong together."
        )


def _require_kind(name: str, module: Any, quantization: QuantizationSpec) -> None:
    """Upstream believes the tensors of a stored checkpoint, whatever its config.json says.

    Where the scales of the scales are gone, it takes the scales as they are.
    """
    if not is_four_bit(module.weight):
        return
    state = module.weight.quant_state
    stored = _kind(state.quant_type, state.nested)
    said = _kind(quantization.quant_type, quantization.double_quant)
    if stored != said:
        raise ModelError(
            f"{name} was loaded as {stored}, and config.json says {said}: the checkpoint is "
            "incomplete, or its config.json belongs to another."
        )


def _kind(quant_type: str, double_quant: bool) -> str:
    return f"{quant_type} {'with' if double_quant else 'without'} double quantization"


def quant_state_tensors(state: Any) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a 4-bit weight: the scales, their own, and the code."""
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return [tensor for tensor in tensors if tensor is not None]
