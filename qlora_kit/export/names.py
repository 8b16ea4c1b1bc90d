"""Which parameter of the model each tensor of a checkpoint is.

transformers renames tensors on loading, and fuses some of them. Where every tensor that is
quantized or adapted is exactly one parameter, a checkpoint can be rewritten tensor by tensor
under its own names, which every other tool knows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_kit.model.skeleton import Skeleton

# What bitsandbytes keeps beside a quantized weight: `X.weight.absmax`, `X.SCB` and so on.
_QUANTIZATION_STATE = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
    r"|\.(SCB|weight_format)$"
)


@dataclass(frozen=True)
class NameMap:
    """What becomes of the tensors of one checkpoint; a quantized weight counts as one."""

    parameters: dict[str, str]
    """Tensor → parameter of the model, one to one."""
    passed: tuple[str, ...]
    """Tensors that are fused on loading and that nobody changes."""
    unused: tuple[str, ...]
    """Tensors that the model does not load."""
    fused: tuple[str, ...]
    """Tensors that are fused on loading and would have to change: no streaming then."""


def map_names(skeleton: Skeleton, names: Iterable[str], changed: Collection[str]) -> NameMap:
    """Match the names of a checkpoint; `changed` are the modules that are quantized or adapted."""
    model = skeleton.model
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    parameters: dict[str, str] = {}
    passed, unused, fused = [], [], []
    for name in names:
        if is_quantization_state(name):
            continue
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if renamed not in state and name in state:
            renamed, pattern = name, None
        if renamed not in state:
            unused.append(name)
        elif pattern is None:
            parameters[name] = renamed
        elif _targets(renamed, pattern, converters) & set(changed):
            fused.append(name)
        else:
            passed.append(name)
    return NameMap(parameters, tuple(passed), tuple(unused), tuple(fused))


def _targets(renamed: str, pattern: str, converters: list[WeightConverter]) -> set[str]:
    """Modules of every parameter that a converter makes of the tensors it matches."""
    converter = next(one for one in converters if pattern in one.source_patterns)
    first, *others = converter.target_patterns
    made = [renamed, *(renamed.replace(first, other) for other in others)]
    return {module_of(parameter) for parameter in made}


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def is_quantization_state(name: str) -> bool:
    return _QUANTIZATION_STATE.search(name) is not None
