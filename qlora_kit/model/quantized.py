"""What of a loaded model is really quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import is_linear, name_matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.model.skeleton import Skeleton
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
        if type(parameter).__name__ in _QUANTIZED_WEIGHTS:
            quantized += count
        total += count
    return Quantized(total, quantized, num_bytes)


def is_four_bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit" and parameter.quant_state is not None


def is_quantized(module: Any) -> bool:
    """Whether a module keeps its weight in 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in _QUANTIZED_WEIGHTS


def four_bit_modules(model: nn.Module) -> Iterator[Any]:
    """The modules whose weight is packed in 4 bits."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            yield module


def never_repacked(model: nn.Module) -> None:
    """Turn off what bitsandbytes does on a CPU with AVX512-BF16 in evaluation: it repacks the
    weights in place, which nothing undoes before the next training step or a merge, and computes
    in bfloat16 whatever dtype was asked for.
    """
    for module in four_bit_modules(model):
        module.support_avx512bf16_for_cpu = False


def require_quantized(
    model: PreTrainedModel,
    skeleton: Skeleton,
    quantization: QuantizationSpec,
    stored_skips: Iterable[str] = (),
) -> Quantized:
    """Fail when a linear layer that should be quantized is not, or has another shape.

    `stored_skips` are those of a checkpoint that is stored quantized.

    Raises:
        ModelError: names the layers.
    """
    counted = count_quantized(model)
    if quantization.num_bits == 16:
        return counted
    skips = (*quantization.skip_modules, *skeleton.default_skips, *stored_skips)
    missed = []
    for name, module in model.named_modules():
        if not is_linear(module) or name_matches(name, skips):
            continue
        if not is_quantized(module):
            missed.append(name)
        else:
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
    return counted


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
