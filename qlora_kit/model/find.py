"""What a recipe's section on the model names: where it lies, and what it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.model.skeleton import Skeleton, build_skeleton, load_config
from qlora_kit.model.source import ModelSource, find_source

if TYPE_CHECKING:
    from qlora_kit.recipe import ModelSpec


def find_skeleton(spec: ModelSpec) -> tuple[ModelSource, Skeleton]:
    """The model that a recipe's section names: where it lies, and what it is made of.

    Raises:
        ModelError: it is not there, or is not a causal language model that transformers knows.
    """
    source = find_source(spec)
    config = load_config(source.folder, spec.trust_remote_code)
    return source, build_skeleton(config, spec.trust_remote_code)
