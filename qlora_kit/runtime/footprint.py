"""What a loaded transformers model takes: true parameters by form, bytes in memory and on disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kit.model.quantized import is_four_bit, quant_state_tensors
from qlora_kit.model.skeleton import is_linear

# What loading reads; what else a folder holds (model card, certificate, logs) is no model.
_NEEDED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
)
# Of a weight that is kept in pieces: what is no parameter of the model.
_SCALES = ("scale", "zero_point", "shape", "g_idx", "global")


def parameters_by_form(model: nn.Module) -> dict[str, int]:
    """True parameters by the form in which they are kept, most first; tied ones count once, and
    modules that a copy trained in full stands in for not at all.

    A 4-bit weight is packed, two to a byte or eight to an int32: its layer's own sizes say how
    many parameters it holds. Scales and zero points are no parameters of the model.
    """
    counted: Counter[str] = Counter()
    seen: set[int] = set()
    set_aside = _set_aside(model)
    for module in model.modules():
        if id(module) in set_aside:
            continue
        packed = _packed_weight(module)
        for name, tensor in _own_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if packed is not None and tensor is packed:
                counted[_packed_form(module, tensor)] += _num_weights(module)
            elif isinstance(tensor, nn.Parameter) and not (is_linear(module) and _is_scale(name)):
                form, number = _form_of(tensor)
                counted[form] += number
    return dict(counted.most_common())


def _set_aside(model: nn.Module) -> set[int]:
    """The modules that PEFT has kept beside copies that are trained in full."""
    from peft.utils import ModulesToSaveWrapper

    return {
        id(inside)
        for module in model.modules()
        if isinstance(module, ModulesToSaveWrapper)
        for inside in module.original_module.modules()
    }


def memory_bytes(model: nn.Module) -> int:
    """Every parameter and buffer, and the scales that are kept beside them."""
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for _, tensor in _own_tensors(module):
            for one in (tensor, *_beside(tensor)):
                tensors[id(one)] = one
    return sum(one.numel() * one.element_size() for one in tensors.values())


def disk_bytes(folders: Iterable[Path]) -> int:
    """Of all files in the folders that loading needs."""
    found = {
        path
        for folder in folders
        for pattern in _NEEDED
        for path in folder.glob(pattern)
        if path.is_file()
    }
    return sum(path.stat().st_size for path in found)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers that are the module's own, not its children's."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _packed_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear layer that is kept as integers, other than bitsandbytes' own."""
    if not is_linear(module):
        return None
    whole = [
        tensor
        for name, tensor in _own_tensors(module)
        if not _is_scale(name) and not tensor.is_floating_point() and not _is_bitsandbytes(tensor)
    ]
    return max(whole, key=lambda tensor: tensor.numel(), default=None)


def _num_weights(module: Any) -> int:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nx) * int(module.nf)
    return int(module.in_features) * int(module.out_features)


def _packed_form(module: nn.Module, packed: torch.Tensor) -> str:
    bits = 8 * packed.numel() * packed.element_size() / _num_weights(module)
    return f"int{round(bits)}"


def _form_of(parameter: Any) -> tuple[str, int]:
    if is_four_bit(parameter):
        return str(parameter.quant_state.quant_type), int(parameter.quant_state.shape.numel())
    return str(parameter.dtype).removeprefix("torch."), int(parameter.numel())


def _is_bitsandbytes(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def _is_scale(name: str) -> bool:
    return any(part in name for part in _SCALES)


def _beside(tensor: Any) -> list[torch.Tensor]:
    """The scales that bitsandbytes keeps at a weight."""
    if is_four_bit(tensor):
        return quant_state_tensors(tensor.quant_state)
    if type(tensor).__name__ == "Int8Params" and tensor.SCB is not None:
        return [tensor.SCB]
    return []
