"""The base model's modules without its weights: what will be quantized is known before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device, and its linear modules by full name."""

    model: PreTrainedModel
    linear_modules: tuple[str, ...]
    """Linear and Conv1D modules but for those in `default_skips`."""
    default_skips: tuple[str, ...]
    """Modules that the library never quantizes: the head, and what is tied to it."""
    expert_parameters: tuple[str, ...]
    """Fused expert weights: parameters with three dimensions outside any linear module."""
    foreign_linear_modules: tuple[str, ...]
    """Linear layers of a class of their own, which bitsandbytes passes over."""
    router_modules: tuple[str, ...]
    """Linear modules that choose experts."""


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: it is missing, unreadable, unknown, or needs code that may not run.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model folder.")
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = ""
        if "trust_remote_code" in str(error):
            reason = "the model brings its own Python code"
            hint = " Set model.trust_remote_code: true if you trust where it comes from."
        raise ModelError(f"{folder}/config.json cannot be used: {reason}.{hint}") from error


def build_skeleton(config: PreTrainedConfig, trust_remote_code: bool = False) -> Skeleton:
    """Build the model on the meta device; costs no memory for weights.

    Raises:
        ModelError: it is not a causal language model that transformers knows.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    from transformers import AutoModelForMaskedLM

    fills_gaps = type(config) in AutoModelForMaskedLM._model_mapping
    if fills_gaps and getattr(config, "is_decoder", True) is False:
        raise ModelError(
            f"architecture {config.model_type} reads in both directions, so it is not a causal "
            "language model; take one that generates text."
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"architecture {config.model_type} is not a causal language model that this version "
            f"of transformers can build: {reason}"
        ) from error
    skips = tuple(get_keys_to_not_convert(model))
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    routers = tuple(name for name in linear if _is_router(model, name))
    return Skeleton(
        model=model,
        linear_modules=tuple(name for name in linear if not name_matches(name, skips)),
        default_skips=skips,
        foreign_linear_modules=tuple(
            name
            for name in linear
            if not name_matches(name, skips) and not _bitsandbytes_takes(model.get_submodule(name))
        ),
        expert_parameters=tuple(_expert_parameters(model)),
        router_modules=routers,
    )


def is_linear(module: nn.Module) -> bool:
    """Whether bitsandbytes and PEFT treat it as a linear layer (GPT-2's Conv1D is one)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _bitsandbytes_takes(module: nn.Module) -> bool:
    """transformers' rule for what it replaces: the very class, no subclass of it."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def name_matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """transformers' own rule for skip lists: the whole name, its start, or its end."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, list(patterns))


def _is_router(model: nn.Module, name: str) -> bool:
    parent_name, _, leaf = name.rpartition(".")
    if leaf not in ("gate", "router", "shared_expert_gate"):
        return False
    siblings = {child for child, _ in model.get_submodule(parent_name).named_children()}
    return "experts" in siblings or leaf == "shared_expert_gate"


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3 and not isinstance(owner, nn.Conv1d):
            yield name
