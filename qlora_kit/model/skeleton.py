"""The base model's modules without its weights: what will be quantized is known before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from qlora_kit.errors import ModelError
from qlora_kit.model.configured import read_mapping
from qlora_kit.model.reason import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# A configuration's values reach upstream's arithmetic, look-ups and imports unchecked.
_BAD_CONFIG = (
    StrictDataclassError,
    OSError,
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)

# Linear layers whose weights an architecture's kernels read past the module, so that they can
# neither be packed nor carry an adapter.
_READ_DIRECTLY = {
    "mamba": ("x_proj", "dt_proj", "out_proj"),
    "falcon_mamba": ("x_proj", "dt_proj", "out_proj"),
    "jamba": ("x_proj", "dt_proj", "out_proj"),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h", "bamba", "zamba2"), ("out_proj",)),
}


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and its linear modules by full name."""

    model: PreTrainedModel
    linear_modules: tuple[str, ...]
    """Linear and Conv1D modules but for those in `default_skips`."""
    default_skips: tuple[str, ...]
    """Modules that the library never quantizes: the head, and what is tied to it."""
    expert_parameters: tuple[str, ...]
    """Fused expert weights, which belong to no linear module."""
    foreign_linear_modules: tuple[str, ...]
    """Linear layers of a class of their own, which bitsandbytes passes over."""
    router_modules: tuple[str, ...]
    """Linear modules that choose experts."""
    read_directly: tuple[str, ...]
    """Linear modules whose weights are read past them."""


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: it is missing, unreadable, unknown, or needs code that may not run.
    """
    from transformers import AutoConfig, PreTrainedConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder{_what(folder)}")
    read_mapping(path)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except _BAD_CONFIG as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder} brings its own Python code, which does not run unasked. Set "
                "model.trust_remote_code: true if you trust where it comes from."
            ) from error
        raise ModelError(f"{path} cannot be used: {reason_of(error)}") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def _what(folder: Path) -> str:
    """What a folder without config.json seems to be instead."""
    if (folder / "adapter_config.json").is_file():
        return ": it holds an adapter; name the base model that it was trained on."
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if ggufs:
        return f"; set model.gguf_file: {ggufs[0]} to read that file."
    return "."


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> Skeleton:
    """Build the model on the meta device; costs no memory for weights.

    Raises:
        ModelError: it is not a causal language model that transformers knows.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    _refuse_encoders(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _BAD_CONFIG as error:
        raise ModelError(
            f"architecture {config.model_type} is not a causal language model that this version "
            f"of transformers can build from its config.json: {reason_of(error)}"
        ) from error
    skips = tuple(sorted(get_keys_to_not_convert(model)))
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    quantizable = tuple(name for name in linear if not name_matches(name, skips))
    return Skeleton(
        model=model,
        linear_modules=quantizable,
        default_skips=skips,
        expert_parameters=tuple(_expert_parameters(model)),
        foreign_linear_modules=tuple(
            name for name in quantizable if not _bitsandbytes_takes(model.get_submodule(name))
        ),
        router_modules=tuple(name for name in linear if _is_router(model, name)),
        read_directly=tuple(
            name
            for name in quantizable
            if name.rpartition(".")[2] in _READ_DIRECTLY.get(config.model_type, ())
        ),
    )


def _refuse_encoders(config: PreTrainedConfig) -> None:
    """transformers builds a causal model of these as well, from a part of their weights or with
    every token seeing the ones after it.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"architecture {config.model_type} maps one sequence to another, so it is not a causal "
            "language model; take one that only continues text."
        )
    fills_gaps = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills_gaps and getattr(config, "is_decoder", True) is False:
        raise ModelError(
            f"architecture {config.model_type} reads in both directions, so it is not a causal "
            "language model; take one that generates text."
        )


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT treats it as a linear layer (GPT-2's Conv1D is one)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def name_matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """transformers' own rule for skip lists: the whole name, its start, or its end."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, list(patterns))


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules that text passes through, without the head: not an image tower or its projector."""
    is_text_alone = model.config.get_text_config() is model.config
    inside = {id(module) for module in (model if is_text_alone else model.get_decoder()).modules()}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if id(module) in inside and module is not head:
            yield name, module


def _bitsandbytes_takes(module: nn.Module) -> bool:
    """transformers' rule for what it replaces: the very class, no subclass of it."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _is_router(model: nn.Module, name: str) -> bool:
    """By name: a router, a part of one, or a gate that stands beside experts."""
    parent_name, _, leaf = name.rpartition(".")
    if leaf == "shared_expert_gate" or "router" in name.split("."):
        return True
    siblings = {child for child, _ in model.get_submodule(parent_name).named_children()}
    return leaf == "gate" and "experts" in siblings


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if is_linear(owner) or isinstance(owner, nn.Conv1d):
            continue
        stacked = parameter.ndim == 3 and min(parameter.shape) > 1
        of_experts = parameter.ndim == 2 and "expert" in type(owner).__name__.lower()
        if stacked or of_experts:
            yield name
