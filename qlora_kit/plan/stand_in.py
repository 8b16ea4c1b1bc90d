"""A base as it will be once it is loaded, of tensors without numbers.

The skeleton's modules, with every tensor in the dtype and every packed weight in the size that
loading gives it, on what seems to be a CPU: kernels are chosen, and autocast casts, as on one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.model.base import Base, prepare_for_training, upcasts_norms
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.blocks import BLOCK_SIZE
from qlora_kit.model.quantized import count_quantized, eight_bit_scale, is_four_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.memory.live import LiveTensors
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import QuantizationSpec

_NESTED_BLOCK_SIZE = 256
# Of what DoRA lets go, as much leaves holes as of other tensors: by `bench_plan.py --dora`, whose
# processes are told up to 1.12 of themselves with all of it, and down to 0.86 without.
_SHARE_OF_DORA = 0.5
_CODE_ENTRIES, _NESTED_CODE_ENTRIES = 16, 256


def stand_in_base(
    skeleton: Skeleton,
    vocabulary: Vocabulary,
    quantization: QuantizationSpec,
    compute_dtype: torch.dtype,
) -> Base:
    """As `load_base` returns it, still on the meta device; the skeleton's model becomes the
    stand-in.
    """
    model = skeleton.model
    bits = quantized_bits(skeleton, quantization)
    for name, num_bits in bits.items():
        linear = model.get_submodule(name)
        if num_bits == 8:
            layer = _eight_bit_layer(linear)
        else:
            layer = _four_bit_layer(linear, quantization, compute_dtype)
        model.set_submodule(name, layer, strict=True)
    model.requires_grad_(False)
    model.eval()
    if 4 in bits.values():
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    if 8 in bits.values():
        model.is_loaded_in_8bit = True  # type: ignore[assignment]
    return Base(
        model=model,
        tokenizer=vocabulary.tokenizer,
        source=vocabulary.source,
        skeleton=replace(skeleton, model=model),
        fingerprint="",
        configured="",
        compute_dtype=compute_dtype,
        compute_reason="",
        pad=vocabulary.pad,
        quantized=count_quantized(model),
        stop_ids=vocabulary.stop_ids,
    )


def _four_bit_layer(
    linear: nn.Module, quantization: QuantizationSpec, compute_dtype: torch.dtype
) -> Any:
    """What takes the place of a linear layer, still without tensors."""
    from bitsandbytes.nn import Linear4bit

    num_out, num_in = _shape(linear)
    layer: Any = Linear4bit(
        num_in,
        num_out,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
        device="meta",
    )
    layer.support_avx512bf16_for_cpu = False
    return layer


def _eight_bit_layer(linear: nn.Module) -> nn.Module:
    """Without outliers, which evaluation computes apart, as nobody can know how many there are."""
    from bitsandbytes.nn import Linear8bitLt

    num_out, num_in = _shape(linear)
    layer: nn.Module = Linear8bitLt(
        num_in,
        num_out,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=0.0,
        device="meta",
    )
    return layer


def _shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs; GPT-2's layers hold them the other way round."""
    from transformers.pytorch_utils import Conv1D

    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    num_out, num_in = weight.shape[::-1] if isinstance(linear, Conv1D) else weight.shape
    return num_out, num_in


@contextmanager
def unpacked_for_dora() -> Iterator[None]:
    """PEFT, which takes norms of unpacked weights for DoRA, gets those of stand-ins; on the meta
    device, where an adapter is attached, of the size that they will have.
    """
    from peft.tuners.lora import dora

    own = dora.dequantize_module_weight
    dora.dequantize_module_weight = partial(_unpacked, own)
    try:
        yield
    finally:
        dora.dequantize_module_weight = own


@contextmanager
def dora_with_fewer_holes(live: LiveTensors | None) -> Iterator[None]:
    """What DoRA unpacks and multiplies for the norms of a layer is gone again before the graph,
    which keeps others' holes open, grows, and lies mostly where the last layer's lay.

    Args:
        live: what counts a trial; None: nothing does.
    """
    from peft.tuners.lora import dora

    if live is None:
        yield
        return
    own = dora.DoraLinearLayer.forward

    def forward(*given: Any, **named: Any) -> Any:
        gone_before = live.gone_bytes
        result = own(*given, **named)
        gone = live.gone_bytes - gone_before
        live.gone_bytes = gone_before + int(_SHARE_OF_DORA * gone)
        return result

    dora.DoraLinearLayer.forward = forward
    try:
        yield
    finally:
        dora.DoraLinearLayer.forward = own


def _unpacked(own: Callable[[Any], torch.Tensor], layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if weight.is_meta and type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
        return torch.empty((layer.out_features, layer.in_features), device="meta")
    if is_four_bit(weight):
        unpacked: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return unpacked
    scale = eight_bit_scale(layer)
    return own(layer) if scale is None else int8_vectorwise_dequant(weight.data, scale)


def give_tensors(
    model: PreTrainedModel, quantization: QuantizationSpec, compute_dtype: torch.dtype
) -> None:
    """Tensors in place of those of the meta device, in the sizes that loading and
    `prepare_for_training` give them. Call it under FakeTensorMode, with the adapter attached.
    """
    kept_whole = tuple(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        is_whole = any(part in kept_whole for part in name.split("."))
        frozen = torch.float32 if is_whole else compute_dtype
        for key, parameter in list(module.named_parameters(recurse=False)):
            if type(parameter).__name__ == "Params4bit":
                module.weight = _packed(module, quantization, compute_dtype)
                continue
            if type(parameter).__name__ == "Int8Params":
                module.weight = _in_eight_bits(module)
                continue
            dtype = parameter.dtype
            if dtype.is_floating_point:
                dtype = torch.float32 if parameter.requires_grad else frozen
            fresh = torch.empty(parameter.shape, dtype=dtype)
            setattr(module, key, nn.Parameter(fresh, requires_grad=parameter.requires_grad))
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()
    trained = [one for one in model.parameters() if one.requires_grad]
    prepare_for_training(model, upcasts_norms(quantization, compute_dtype))
    for parameter in trained:
        parameter.requires_grad_(True)


def _packed(layer: Any, quantization: QuantizationSpec, compute_dtype: torch.dtype) -> nn.Parameter:
    shape = (layer.out_features, layer.in_features)
    storage: torch.dtype = getattr(torch, quantization.quant_storage)
    num_words = -(-math.prod(shape) // (2 * storage.itemsize))
    packed: Any = nn.Parameter(torch.empty((num_words, 1), dtype=storage), requires_grad=False)
    packed.quant_state = _quant_state(shape, quantization, compute_dtype)
    found: nn.Parameter = packed
    return found


def _in_eight_bits(layer: Any) -> nn.Parameter:
    """As after the first forward pass, which hands codes and scales to the layer's state."""
    data = torch.empty((layer.out_features, layer.in_features), dtype=torch.int8)
    layer.state.CB, layer.state.SCB = data, torch.empty(layer.out_features)
    packed: Any = nn.Parameter(data, requires_grad=False)
    packed.CB = packed.SCB = None
    found: nn.Parameter = packed
    return found


def _quant_state(
    shape: tuple[int, int], quantization: QuantizationSpec, compute_dtype: torch.dtype
) -> Any:
    from bitsandbytes.functional import QuantState

    num_blocks = -(-math.prod(shape) // BLOCK_SIZE)
    nested: Any = None
    if quantization.double_quant:
        nested = QuantState(
            absmax=torch.empty(-(-num_blocks // _NESTED_BLOCK_SIZE)),
            blocksize=_NESTED_BLOCK_SIZE,
            code=torch.empty(_NESTED_CODE_ENTRIES),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=torch.empty(num_blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size(shape),
        dtype=compute_dtype,
        blocksize=BLOCK_SIZE,
        quant_type=quantization.quant_type,
        code=torch.empty(_CODE_ENTRIES),
        offset=torch.empty(()) if nested else None,
        state2=nested,
    )
