"""Which linear layers a method takes, and what it would pass over without a word."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import is_linear, name_matches

if TYPE_CHECKING:
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.quantize.method import Source

# Architectures whose forward pass scales linear weights in place.
_REWRITES_ITS_WEIGHTS = ("rwkv",)
_ALL_OF_IT = "gguf:TYPE quantizes such a model, or keep it in 16 bits"


def skipped_names(skeleton: Skeleton, skip_modules: Sequence[str]) -> list[str]:
    """Patterns of what stays unquantized: the user's, united with the head and what is tied to it.

    transformers takes a list of one's own *instead* of its default one.
    """
    return sorted({*skip_modules, *skeleton.default_skips})


def quantized_layers(skeleton: Skeleton, skip_modules: Sequence[str]) -> list[str]:
    """Full names of the linear layers that will be quantized, in the order of the model."""
    return [name for name in skeleton.linear_modules if not name_matches(name, tuple(skip_modules))]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's Conv1D keeps its weight the other way round."""
    from transformers.pytorch_utils import Conv1D

    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def require_quantizable(source: Source, skip_modules: Sequence[str], method: str) -> None:
    """Refuse a model of which `method` would leave parts as they are without saying so.

    Raises:
        ModelError: fused experts, linear layers of a foreign class, weights that are read past
            their layer, a skip that skips nothing, or nothing left to quantize.
    """
    skeleton = source.skeleton
    kind = skeleton.model.config.model_type
    _refuse_experts(source, method)
    if kind in _REWRITES_ITS_WEIGHTS:
        raise ModelError(
            f"{kind} rewrites its weights between training and evaluation, which quantized ones do "
            f"not survive; {method} cannot take it. Keep it in 16 bits."
        )
    missed = _not_skipped(skeleton.foreign_linear_modules, skip_modules)
    if missed:
        layer = type(skeleton.model.get_submodule(missed[0])).__name__
        raise ModelError(
            f"{len(missed)} linear layers of {source.name} are of a class of their own ({layer}: "
            f"{', '.join(missed[:3])} …), which {method} does not take; {_skip(missed)}."
        )
    read = _not_skipped(skeleton.read_directly, skip_modules)
    if read:
        raise ModelError(
            f"{kind} reads the weights of {read[0]} and its like past those layers, so they cannot "
            f"be quantized; {_skip(read)}."
        )
    _require_skips(source, skip_modules)
    if not quantized_layers(skeleton, skip_modules):
        raise ModelError(
            f"nothing of {source.name} would be quantized: skip_modules covers every linear layer."
        )


def _refuse_experts(source: Source, method: str) -> None:
    skeleton = source.skeleton
    if not skeleton.expert_parameters:
        return
    counted = {name: p.numel() for name, p in skeleton.model.named_parameters()}
    share = sum(counted[name] for name in skeleton.expert_parameters) / sum(counted.values())
    raise ModelError(
        f"{source.name} ({skeleton.model.config.model_type}) keeps its experts in fused tensors "
        f"({skeleton.expert_parameters[0]} and {len(skeleton.expert_parameters) - 1} more, "
        f"{share:.0%} of the parameters), which {method} does not take: they would stay as they "
        f"are. {_ALL_OF_IT}."
    )


def _not_skipped(names: Collection[str], skip_modules: Sequence[str]) -> list[str]:
    return [name for name in names if not name_matches(name, tuple(skip_modules))]


def _skip(names: Sequence[str]) -> str:
    """The option that leaves these out."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    return f"leave them out with skip_modules=[{', '.join(leaves)}]"


def _require_skips(source: Source, skip_modules: Sequence[str]) -> None:
    linear = [name for name, one in source.skeleton.model.named_modules() if is_linear(one)]
    for skip in (one for one in skip_modules if one not in source.skeleton.default_skips):
        if not any(name_matches(name, (skip,)) for name in linear):
            raise ModelError(
                f"skip_modules: {skip} is neither the start nor the end of the name of a linear "
                f"layer of {source.name}; one of them is {linear[0]}."
            )
