"""What a saved adapter adds to each parameter, by PEFT's own arithmetic, one module at a time."""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import AdapterError
from qlora_kit.export.names import module_of
from qlora_kit.model.skeleton import Skeleton

_PREFIX = "base_model.model."
_LORA_KEY = re.compile(r"^(?P<module>.+?)\.(?P<rest>lora_.+)$")
_TOKEN_KEY = re.compile(r"^(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta$")


@dataclass(frozen=True)
class SavedAdapter:
    """The tensors of an adapter folder, sorted by what they do to the model."""

    folder: Path
    config: LoraConfig
    lora: dict[str, dict[str, torch.Tensor]]
    """Module → its adapter tensors, by the name that PEFT saves them under."""
    replaced: dict[str, torch.Tensor]
    """Parameter → its new value (modules_to_save, embeddings saved whole)."""
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]]
    """Embedding or head → token ids and their new rows, (num_tokens, hidden)."""

    @property
    def modules(self) -> frozenset[str]:
        """Every module that the adapter changes."""
        return frozenset({*self.lora, *self.rows, *(module_of(name) for name in self.replaced)})


def read_adapter(folder: Path, skeleton: Skeleton) -> SavedAdapter:
    """Read PEFT's files; every tensor finds its place or is named.

    Raises:
        AdapterError: files are missing or damaged, it is no LoRA, or a tensor belongs to no
            module of this model.
    """
    config = _read_config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {path.name}, so it is not an adapter.") from None
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    return _sort(folder, config, tensors, skeleton)


def _read_config(folder: Path) -> LoraConfig:
    path = folder / "adapter_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
        config = PeftConfig.from_pretrained(str(folder))
    except OSError:
        raise AdapterError(f"{folder} has no {path.name}, so it is not an adapter.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{folder} is a {kind} adapter; only LORA is merged here.")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in (
        "gaussian",
        "eva",
        "orthogonal",
    ):
        raise AdapterError(
            f"{folder} was initialised with {config.init_lora_weights}, which changed the base it "
            "was trained on; save it with PEFT's path_initial_model_for_weight_conversion first."
        )
    return config


def _sort(
    folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor], skeleton: Skeleton
) -> SavedAdapter:
    modules = {name for name, _ in skeleton.model.named_modules()}
    parameters = set(skeleton.model.state_dict())
    lora: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    replaced: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[tuple[int, ...], torch.Tensor]] = {}
    leftovers = []
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if (match := _LORA_KEY.match(name)) and match["module"] in modules:
            lora[match["module"]][name] = tensor
        elif (match := _TOKEN_KEY.match(name)) and match["module"] in modules:
            rows[match["module"]] = (_token_ids(config, match["module"]), tensor)
        elif (plain := name.replace(".base_layer.", ".")) in parameters:
            replaced[plain] = tensor
        else:
            leftovers.append(key)
    if leftovers:
        raise AdapterError(
            f"{folder}: {len(leftovers)} tensors belong to no module of this model "
            f"({', '.join(leftovers[:3])}); the adapter is for another base."
        )
    return SavedAdapter(folder, config, dict(lora), replaced, rows)


def _token_ids(config: LoraConfig, module: str) -> tuple[int, ...]:
    targets = config.trainable_token_indices
    if isinstance(targets, dict):
        for target, ids in targets.items():
            if module == target or module.endswith(f".{target}"):
                return tuple(ids)
        raise AdapterError(f"the adapter trains rows of {module}, but does not say which.")
    return tuple(targets or ())


def merge_weight(
    adapter: SavedAdapter, name: str, skeleton: Skeleton, weight: torch.Tensor
) -> torch.Tensor:
    """The weight of module `name` with its LoRA update added, as PEFT adds it.

    weight: float32, in the module's own orientation. It is not changed.

    Raises:
        AdapterError: the update does not fit the module, or is not finite.
    """
    leaf = _dense_module(skeleton.model.get_submodule(name), weight, name)
    container = _container(name, leaf)
    config = copy.deepcopy(adapter.config)
    config.target_modules = {name}
    config.exclude_modules = None
    config.modules_to_save = None
    config.trainable_token_indices = None
    config.layers_to_transform = None
    config.layer_replication = None
    config.init_lora_weights = False
    config.fan_in_fan_out = isinstance(leaf, Conv1D)
    config.inference_mode = True
    try:
        inject_adapter_in_model(config, container)
        result = set_peft_model_state_dict(container, adapter.lora[name])
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{adapter.folder}: the update of {name} does not fit: {str(error).splitlines()[0]}"
        ) from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise AdapterError(
            f"{adapter.folder}: the update of {name} is incomplete or has tensors that its "
            f"adapter_config.json does not explain: {', '.join([*missing, *result.unexpected_keys])}"
        )
    layer = container.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    try:
        layer.merge(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"{adapter.folder}: the update of {name}: {error}") from error
    merged = layer.get_base_layer().weight
    assert isinstance(merged, torch.Tensor)
    return merged.detach()


def _dense_module(module: nn.Module, weight: torch.Tensor, name: str) -> nn.Module:
    """A float32 module of the same kind that holds `weight` and nothing else."""
    leaf: nn.Module
    if isinstance(module, Conv1D):
        with torch.device("meta"):
            leaf = Conv1D(weight.shape[1], weight.shape[0])
        leaf.bias = None
    elif isinstance(module, nn.Embedding):
        leaf = nn.Embedding(*weight.shape, device="meta")
    elif isinstance(module, nn.Linear):
        leaf = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        raise AdapterError(f"{name} is a {type(module).__name__}, which is not merged here.")
    leaf.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return leaf


def _container(name: str, leaf: nn.Module) -> nn.Module:
    """An empty model in which `leaf` stands at its full path, so that patterns match its name."""
    *parents, last = name.split(".")
    root = node = nn.Module()
    for parent in parents:
        child = nn.Module()
        node.add_module(parent, child)
        node = child
    node.add_module(last, leaf)
    return root


def survival(delta: torch.Tensor, stored_after: torch.Tensor, base: torch.Tensor) -> float:
    """Share of an update that rounding has left: <stored - base, delta> / <delta, delta>.

    1 where all of it survived; nan for an update of zero.
    """
    update = delta.double().flatten()
    kept = (stored_after.double() - base.double()).flatten()
    return float(kept @ update / (update @ update))


def iterate_untouched(adapter: SavedAdapter, seen: set[str]) -> Iterator[str]:
    """Parameters that the adapter changes and that no tensor of the checkpoint stood for."""
    for name in sorted(adapter.lora):
        if f"{name}.weight" not in seen:
            yield f"{name}.weight"
    for parameter in sorted(adapter.replaced):
        if parameter not in seen:
            yield parameter
