"""What a saved adapter makes of each parameter, by PEFT's own arithmetic, one module at a time."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import AdapterError
from qlora_kit.export.names import module_of
from qlora_kit.model.skeleton import Skeleton

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"^(?P<module>.+?)\.lora_")
_ROWS_KEY = re.compile(r"^(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta$")
_WRAPPERS = re.compile(r"\.(token_adapter|base_layer)(?=\.)")

# Initialisations that leave the base as it is; the others move a part of it into the adapter.
_INNOCENT_INITS = (True, False, "gaussian", "eva")

# float64 copies are made of this many rows at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Rows:
    """New values of some rows of an embedding or a head."""

    token_ids: tuple[int, ...]
    values: torch.Tensor
    """(num_tokens, hidden)"""


@dataclass(frozen=True)
class SavedAdapter:
    """The tensors of an adapter folder, by what they do to the model."""

    folder: Path
    config: LoraConfig
    lora: dict[str, dict[str, torch.Tensor]]
    """Module → its update, under the names that PEFT gives the tensors."""
    replaced: dict[str, torch.Tensor]
    """Parameter → its new value: modules_to_save, and embeddings that were saved whole."""
    rows: dict[str, Rows]
    """Embedding or head → rows that were trained on their own."""

    @property
    def modules(self) -> frozenset[str]:
        """Every module that changes."""
        return frozenset({*self.lora, *self.rows, *map(module_of, self.replaced)})


def read_adapter(folder: Path, skeleton: Skeleton) -> SavedAdapter:
    """Read PEFT's files; every tensor finds its place in the model.

    Raises:
        AdapterError: files are missing or damaged, it cannot be merged, or a tensor belongs to
            no module of this model.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {path.name}, so it holds no adapter.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); it is damaged.") from None
    modules = {name for name, _ in skeleton.model.named_modules()}
    parameters = set(skeleton.model.state_dict())
    lora: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    replaced: dict[str, torch.Tensor] = {}
    rows: dict[str, Rows] = {}
    leftovers = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        plain = _WRAPPERS.sub("", name)
        if (match := _LORA_KEY.match(name)) and match["module"] in modules:
            lora[match["module"]][name] = tensor
        elif (match := _ROWS_KEY.match(name)) and match["module"] in modules:
            ids = _token_ids(folder, config, match["module"], tensor)
            rows[match["module"]] = Rows(ids, tensor.float())
        elif plain in parameters:
            replaced[plain] = tensor
        else:
            leftovers.append(key)
    if leftovers:
        more = f" and {len(leftovers) - 3} more" if len(leftovers) > 3 else ""
        raise AdapterError(
            f"{folder}: {', '.join(leftovers[:3])}{more} belong to no module of this model; the "
            "adapter was made for another one."
        )
    if not tensors:
        raise AdapterError(f"{path} is empty.")
    return SavedAdapter(folder, config, dict(lora), replaced, rows)


def read_config(folder: Path) -> LoraConfig:
    """PEFT's settings of an adapter that can be merged.

    Raises:
        AdapterError: there are none, they cannot be read, or no merge can be faithful to them.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} has no {path.name}, so it holds no adapter.")
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["peft_type"]
        if kind != "LORA":
            raise AdapterError(f"{folder} is a {kind} adapter; only LoRA is merged here.")
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    assert isinstance(config, LoraConfig)
    if config.init_lora_weights not in _INNOCENT_INITS:
        raise AdapterError(
            f"{folder} was initialised with {config.init_lora_weights}, which moves a part of the "
            "base into the adapter; let PEFT convert it (path_initial_model_for_weight_conversion)."
        )
    for name, why in (
        ("alora_invocation_tokens", "acts only after certain tokens"),
        ("layer_replication", "repeats layers of its base"),
        ("arrow_config", "routes between several adapters"),
    ):
        if getattr(config, name):
            raise AdapterError(f"{folder} {why} ({name}), which no merged weight can do.")
    return config


def _token_ids(
    folder: Path, config: LoraConfig, module: str, values: torch.Tensor
) -> tuple[int, ...]:
    named = config.trainable_token_indices
    ids: list[int] = named if isinstance(named, list) else []
    if isinstance(named, dict):
        for target, listed in named.items():
            if module == target or module.endswith(f".{target}"):
                ids = listed
    if len(ids) != values.shape[0]:
        raise AdapterError(
            f"{folder}: {module} has {values.shape[0]} trained rows, but {CONFIG_FILE} names "
            f"{len(ids)} tokens for it."
        )
    return tuple(ids)


def merge_lora(
    adapter: SavedAdapter, name: str, skeleton: Skeleton, weight: torch.Tensor
) -> torch.Tensor:
    """The weight of module `name` with its low-rank update added.

    weight: float32, in the module's own orientation. It is left as it is.

    Raises:
        AdapterError: the update does not fit the module, or is not finite.
    """
    leaf = _dense_leaf(adapter, name, skeleton, weight)
    merged = _merged_leaf(adapter, name, leaf).weight
    assert isinstance(merged, torch.Tensor)
    return merged.detach()


def merge_lora_bias(
    adapter: SavedAdapter, name: str, skeleton: Skeleton, bias: torch.Tensor
) -> torch.Tensor:
    """The bias of module `name` with the update's own bias added (`lora_bias`)."""
    weight = skeleton.model.get_parameter(f"{name}.weight")
    leaf = _dense_leaf(adapter, name, skeleton, torch.zeros(weight.shape))
    leaf.bias = nn.Parameter(bias.clone(), requires_grad=False)
    merged = _merged_leaf(adapter, name, leaf).bias
    assert isinstance(merged, torch.Tensor)
    return merged.detach()


def _merged_leaf(adapter: SavedAdapter, name: str, leaf: nn.Module) -> nn.Module:
    """Let PEFT inject the adapter into a model that has only this module, and merge it."""
    container = _container(name, leaf)
    config = copy.deepcopy(adapter.config)
    config.target_modules = {name}
    config.rank_pattern = _matching(config.rank_pattern, name)
    config.alpha_pattern = _matching(config.alpha_pattern, name)
    config.exclude_modules = None
    config.layers_to_transform = None
    config.modules_to_save = None
    config.trainable_token_indices = None
    config.ensure_weight_tying = False
    config.init_lora_weights = False
    config.fan_in_fan_out = isinstance(leaf, Conv1D)
    config.inference_mode = True
    try:
        inject_adapter_in_model(config, container)
        result = set_peft_model_state_dict(container, adapter.lora[name])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"{adapter.folder}: the update of {name} does not fit: {reason}"
        ) from error
    wrong = [*(key for key in result.missing_keys if ".lora_" in key), *result.unexpected_keys]
    if wrong:
        raise AdapterError(
            f"{adapter.folder}: the update of {name} is not what {CONFIG_FILE} describes "
            f"({', '.join(wrong)})."
        )
    layer = container.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    try:
        layer.merge(safe_merge=True)
    except (ValueError, RuntimeError) as error:
        raise AdapterError(f"{adapter.folder}: the update of {name}: {error}") from error
    merged = layer.get_base_layer()
    assert isinstance(merged, nn.Module)
    return merged


def _matching(pattern: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry that holds for one module; PEFT warns about the others."""
    key = get_pattern_key(pattern.keys(), name)
    return {key: pattern[key]} if key in pattern else {}


def _dense_leaf(
    adapter: SavedAdapter, name: str, skeleton: Skeleton, weight: torch.Tensor
) -> nn.Module:
    """A float32 module of the same kind that holds a copy of `weight`."""
    module = skeleton.model.get_submodule(name)
    leaf: nn.Module
    if isinstance(module, Conv1D):
        with torch.device("meta"):
            leaf = Conv1D(weight.shape[1], weight.shape[0])
    elif isinstance(module, nn.Embedding):
        leaf = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif isinstance(module, nn.Linear):
        leaf = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        raise AdapterError(
            f"{adapter.folder}: {name} is a {type(module).__name__}, which is not merged here."
        )
    leaf.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if not isinstance(leaf, nn.Embedding):
        bias = None
        if adapter.config.lora_bias and isinstance(module.bias, torch.Tensor):
            bias = nn.Parameter(torch.zeros(module.bias.shape), requires_grad=False)
        leaf.register_parameter("bias", bias)
    return leaf


def _container(name: str, leaf: nn.Module) -> nn.Module:
    """A model in which only `leaf` stands, at its full path, so that patterns match its name."""
    *parents, last = name.split(".")
    root = node = nn.Module()
    for parent in parents:
        child = nn.Module()
        node.add_module(parent, child)
        node = child
    node.add_module(last, leaf)
    return root


def survival(delta: torch.Tensor, stored: torch.Tensor, base: torch.Tensor) -> float:
    """Share of an update that storing has left: <stored - base, delta> / <delta, delta>.

    1 where all of it survived; 1 for an update of zero, of which nothing can be lost.
    """
    norm = kept = 0.0
    parts = zip(delta.split(_ROWS), stored.split(_ROWS), base.split(_ROWS), strict=True)
    for update, after, before in parts:
        direction = update.double().flatten()
        norm += float(direction @ direction)
        kept += float((after.double() - before.double()).flatten() @ direction)
    return kept / norm if norm else 1.0
