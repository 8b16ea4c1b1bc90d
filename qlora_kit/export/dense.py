"""A base checkpoint as dense float32 tensors, one at a time: as stored, or as training saw it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.names import NameMap, module_of
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.skeleton import Skeleton
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import QuantizationSpec

_STATE_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE_BLOBS = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of a base."""

    name: str
    """In the checkpoint."""
    parameter: str | None
    """In the model; None for one that is fused with others on loading."""
    value: torch.Tensor
    """float32 in the checkpoint's shape and orientation; tensors of integers as they are."""
    dtype: torch.dtype
    """What it is stored in."""

    @property
    def module(self) -> str | None:
        return None if self.parameter is None else module_of(self.parameter)


@dataclass(frozen=True)
class AsTrained:
    """How training kept its base: the settings that decide every dequantized value."""

    quantization: QuantizationSpec
    compute_dtype: torch.dtype
    device: str = "cpu"
    """Where it was quantized; kinds of devices may round a block's scale differently."""


def iterate_dense(
    checkpoint: Checkpoint, names: NameMap, skeleton: Skeleton, as_trained: AsTrained | None
) -> Iterator[DenseTensor]:
    """Every tensor that the model loads, in float32, with no more than one in memory.

    With `as_trained` each value is the one that the trained model computed with: weights that
    training quantized go through the same quantization and back, everything else through the
    dtype it was loaded in. Without, values are as stored. A weight that is stored quantized is
    dequantized from what is stored, either way.

    Raises:
        ModelError: a tensor is fused on loading and would have to change (`names.fused`).
    """
    if names.fused:
        raise ModelError(
            f"{checkpoint.folder}: {names.fused[0]} is fused with others when it is loaded, so it "
            "cannot be changed on its own."
        )
    bits: dict[str, int] = {}
    if as_trained is not None:
        bits = quantized_bits(skeleton, as_trained.quantization)
    for name in names.passed:
        tensor = checkpoint.tensor(name)
        yield DenseTensor(name, None, _widen(tensor), tensor.dtype)
    for name, parameter in names.parameters.items():
        module = skeleton.model.get_submodule(module_of(parameter))
        transposed = isinstance(module, Conv1D)
        if is_stored_quantized(checkpoint, name):
            value = read_quantized(checkpoint, name)
            value = value.T.contiguous() if transposed else value
            yield DenseTensor(name, parameter, value, checkpoint.describe(name)[1])
            continue
        value = checkpoint.tensor(name)
        dtype = value.dtype
        if as_trained is not None and value.is_floating_point():
            value = value.to(loaded_dtype(skeleton, parameter, as_trained.compute_dtype))
            if parameter.endswith(".weight") and module_of(parameter) in bits:
                value = requantize(value, transposed, as_trained, bits[module_of(parameter)])
        yield DenseTensor(name, parameter, _widen(value), dtype)


def requantize(
    weight: torch.Tensor, transposed: bool, as_trained: AsTrained, num_bits: int
) -> torch.Tensor:
    """Quantize to 4 or 8 bits as loading does, and dequantize in float32; shape and orientation
    stay.

    weight: (out, in), or (in, out) where `transposed`: bitsandbytes quantizes GPT-2's Conv1D
    the other way round.
    """
    turned = weight.T if transposed else weight
    num_out, num_in = turned.shape
    settings = as_trained.quantization
    layer: nn.Module
    if num_bits == 8:
        layer = bnb.nn.Linear8bitLt(
            num_in, num_out, bias=False, has_fp16_weights=False, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(
            turned.to("cpu"), requires_grad=False, has_fp16_weights=False
        ).to(as_trained.device)
    else:
        layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, device="meta")
        layer.weight = bnb.nn.Params4bit(
            turned,
            requires_grad=False,
            compress_statistics=settings.double_quant,
            quant_type=settings.quant_type,
            quant_storage=getattr(torch, settings.quant_storage),
        ).to(as_trained.device)
    dense = dequantized_weight(layer).cpu()
    return dense.T.contiguous() if transposed else dense


def is_stored_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether `name` is a weight that bitsandbytes stored in 4 or 8 bits."""
    return name.endswith(".weight") and (
        f"{name}.absmax" in checkpoint or _scale_name(name) in checkpoint
    )


def read_quantized(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Dequantize a weight that is stored quantized: float32, shape (out, in)."""
    stored = checkpoint.tensor(name)
    scale_name = _scale_name(name)
    if scale_name in checkpoint:
        scale = checkpoint.tensor(scale_name)
        return stored.float() * (scale.float().view(-1, 1) / 127.0)
    parts = {
        part: checkpoint.tensor(f"{name}.{part}")
        for part in (*_STATE_PARTS, *_STATE_BLOBS)
        if f"{name}.{part}" in checkpoint
    }
    try:
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{checkpoint.folder}: {name} lacks a part of its quantization state ({error}); the "
            "checkpoint is damaged. Get it again."
        ) from error
    state.dtype = torch.float32
    dense: torch.Tensor = bnb.functional.dequantize_4bit(stored, state)
    return dense


def loaded_dtype(skeleton: Skeleton, parameter: str, dtype: torch.dtype) -> torch.dtype:
    """What loading in `dtype` casts a parameter to: some models keep some in float32."""
    plan: dict[str, torch.dtype] = skeleton.model._get_dtype_plan(dtype)
    for pattern, kept in plan.items():
        if re.search(pattern.replace("*", ".*"), parameter):
            return kept
    return dtype


def stored_dtype(checkpoint: Checkpoint, names: NameMap) -> torch.dtype:
    """The dtype that most of a checkpoint's unquantized numbers have."""
    counts: Counter[torch.dtype] = Counter()
    for name in (*names.parameters, *names.passed):
        shape, dtype = checkpoint.describe(name)
        if dtype.is_floating_point and not is_stored_quantized(checkpoint, name):
            counts[dtype] += shape.numel()
    if not counts:
        return torch.float32
    dtype = counts.most_common(1)[0][0]
    return torch.float32 if dtype == torch.float64 else dtype


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.SCB"
