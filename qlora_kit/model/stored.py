"""What a checkpoint stores, held against the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.weights import WeightFiles


@dataclass(frozen=True)
class StoredNames:
    """Which parameter of the model each tensor of a checkpoint is."""

    parameters: dict[str, str]
    """Tensor → parameter, for those that are one parameter as they stand."""
    num_converted: int
    """Tensors that loading fuses or cuts."""


def match_names(skeleton: Skeleton, names: Iterable[str]) -> StoredNames:
    """Names as transformers reads them: renamed where an architecture's names have changed."""
    model = skeleton.model
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    parameters = {}
    num_converted = 0
    for name in names:
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None:
            num_converted += 1
        elif renamed in state:
            parameters[name] = renamed
        elif name in state:
            parameters[name] = name
    return StoredNames(parameters, num_converted)


def require_fitting(skeleton: Skeleton, weights: WeightFiles) -> None:
    """Refuse a checkpoint that lacks parameters, or has them in another shape.

    transformers fills the ones with random numbers, and takes the others when it quantizes.

    Raises:
        ModelError: names the tensor.
    """
    names = match_names(skeleton, weights.tensors)
    state = skeleton.model.state_dict()
    for name, parameter in names.parameters.items():
        stored, wanted = weights.tensors[name].shape, tuple(state[parameter].shape)
        if stored != wanted:
            raise ModelError(
                f"{weights.tensors[name].file} holds {name} in shape {list(stored)}, and "
                f"config.json describes {list(wanted)}: they do not belong together."
            )
    if names.num_converted == 0:
        require_none_missing(skeleton, _missing(skeleton, set(names.parameters.values())))


def require_none_missing(skeleton: Skeleton, missing: Iterable[str]) -> None:
    """Raises ModelError naming parameters that would start with random numbers."""
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(
            f"the checkpoint has no weights for {', '.join(names[:3])}{more} of "
            f"{type(skeleton.model).__name__}: it is incomplete, or was made for another purpose "
            "than generating text."
        )


def _missing(skeleton: Skeleton, stored: set[str]) -> list[str]:
    model = skeleton.model
    ties = model.all_tied_weights_keys
    tied = {name for pair in ties.items() if stored & set(pair) for name in pair}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in stored | tied and not any(pattern.search(name) for pattern in ignored)
    ]
