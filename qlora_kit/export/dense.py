"""A base checkpoint as dense float32 tensors, one at a time: as stored, or as training saw it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.names import NameMap, map_names, module_of, quantized_modules
from qlora_kit.model.skeleton import Skeleton
from qlora_kit.model.weight import dequantized_weight
from qlora_kit.recipe import QuantizationSpec


@dataclass(frozen=True)
class DenseTensor:
    """One tensor of a checkpoint."""

    name: str
    """In the checkpoint."""
    parameter: str | None
    """In the model; None for a tensor that is copied as it is."""
    value: torch.Tensor
    """float32, in the checkpoint's own shape and orientation."""
    dtype: torch.dtype
    """What it is stored in; of a quantized weight, what it was quantized from where that is
    known, else float32."""

    @property
    def module(self) -> str | None:
        return None if self.parameter is None else module_of(self.parameter)


@dataclass(frozen=True)
class AsTrained:
    """How training kept its base: the settings that decide every dequantized value."""

    quantization: QuantizationSpec
    compute_dtype: torch.dtype
    device: str = "cpu"
    """Where it is quantized; devices may round a block's scale differently."""


def iterate_dense(
    folder: Path,
    skeleton: Skeleton,
    as_trained: AsTrained | None,
    changed: Collection[str] = (),
    allow_pickle: bool = False,
) -> Iterator[DenseTensor]:
    """Every tensor of the checkpoint that the model loads, in float32.

    With `as_trained` each value is the one that the trained model computed with: weights that
    training quantized go through the same quantization and back, everything else through the
    compute dtype. Without, values are as stored; weights that are stored quantized are
    dequantized from what is stored either way. `changed` are further modules whose tensors the
    caller will change.

    Raises:
        ModelError: `requires_memory` is true of this checkpoint, or it is damaged.
    """
    with Checkpoint(folder, allow_pickle) as checkpoint:
        quantized = (
            frozenset[str]()
            if as_trained is None
            else quantized_modules(skeleton, as_trained.quantization)
        )
        names = map_names(skeleton, checkpoint.names(), {*changed, *quantized})
        if names.fused:
            raise ModelError(
                f"{folder}: {names.fused[0]} is fused with others on loading, so it cannot be "
                "rewritten on its own."
            )
        yield from _stream(checkpoint, names, skeleton, as_trained, quantized)


def _stream(
    checkpoint: Checkpoint,
    names: NameMap,
    skeleton: Skeleton,
    as_trained: AsTrained | None,
    quantized: Collection[str],
) -> Iterator[DenseTensor]:
    for name in names.passed:
        tensor = checkpoint.tensor(name)
        yield DenseTensor(name, None, tensor.float(), tensor.dtype)
    for name, parameter in names.parameters.items():
        module = skeleton.model.get_submodule(module_of(parameter))
        if is_stored_quantized(checkpoint, name):
            value = read_quantized(checkpoint, name)
            if isinstance(module, Conv1D):
                value = value.T.contiguous()
            yield DenseTensor(name, parameter, value, torch.float32)
            continue
        tensor = checkpoint.tensor(name)
        if not tensor.is_floating_point():
            yield DenseTensor(name, parameter, tensor, tensor.dtype)
            continue
        value = tensor
        if as_trained is not None:
            value = value.to(loaded_dtype(skeleton, parameter, as_trained.compute_dtype))
            if parameter.endswith(".weight") and module_of(parameter) in quantized:
                value = requantize(value, isinstance(module, Conv1D), as_trained)
        yield DenseTensor(name, parameter, value.float(), tensor.dtype)


def requantize(weight: torch.Tensor, transposed: bool, as_trained: AsTrained) -> torch.Tensor:
    """Quantize as loading did and dequantize in float32; shape and orientation stay.

    weight: (out, in), or (in, out) where `transposed` (GPT-2's Conv1D, which bitsandbytes
    quantizes the other way round).
    """
    turned = weight.T if transposed else weight
    num_out, num_in = turned.shape
    settings = as_trained.quantization
    layer: nn.Module
    if settings.load_in_8bit:
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
    """Whether a weight is stored by bitsandbytes in 4 or 8 bits."""
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
        part.removeprefix(f"{name}."): checkpoint.tensor(part)
        for part in checkpoint.names()
        if part.startswith(f"{name}.")
    }
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(stored, state)


def loaded_dtype(skeleton: Skeleton, parameter: str, compute_dtype: torch.dtype) -> torch.dtype:
    """What loading casts a parameter to: some models keep some of theirs in float32."""
    model = skeleton.model
    kept = list(model._keep_in_fp32_modules_strict or ())
    if compute_dtype == torch.float16:
        kept += list(model._keep_in_fp32_modules or ())
    if compute_dtype != torch.float32 and any(
        re.search(rf"(^|\.){one}(\.|$)", parameter) for one in kept
    ):
        return torch.float32
    return compute_dtype


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('.weight')}.SCB"
