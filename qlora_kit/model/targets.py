"""Which modules an adapter goes on; what cannot work is found on the skeleton, before the weights
are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.model.bits import quantized_bits
from qlora_kit.model.skeleton import is_linear, text_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.recipe import LoraSpec, QuantizationSpec


@dataclass(frozen=True)
class Targets:
    """Module names as PEFT is to be given them."""

    modules: tuple[str, ...]
    """Full names of what carries low-rank updates."""
    named: tuple[str, ...]
    """The same, by last parts of names where those select nothing else."""
    excluded: tuple[str, ...]
    modules_to_save: tuple[str, ...]

    def saves(self, name: str) -> bool:
        """Whether a module is trained in full."""
        return _is_inside(name, self.modules_to_save)


def require_targets(skeleton: Skeleton, spec: LoraSpec, quantization: QuantizationSpec) -> None:
    """Refuse an adapter that this base cannot carry.

    Raises:
        AdapterError: names the key and the module.
    """
    model = skeleton.model
    targets = find_targets(skeleton, spec)
    _refuse_quantized(skeleton, quantization, targets.modules_to_save)
    if spec.init == "loftq":
        prequantized = getattr(model.config, "quantization_config", None) is not None
        if not quantization.is_quantized or prequantized:
            why = "is stored quantized" if prequantized else "is not quantized"
            raise AdapterError(
                "lora.init: loftq fits the adapter to the error of quantizing 16-bit weights, and "
                f"this base {why}; use init: default."
            )
    if spec.new_tokens:
        _refuse_wrapped_embeddings(model, targets)


def refuse_dora(use_dora: bool, quantization: QuantizationSpec, device: str) -> None:
    """Refuse what loses the scales of 8-bit weights after one forward pass.

    Reading a weight for DoRA, PEFT moves it to the CPU again, by then without its scales.

    Raises:
        AdapterError: DoRA on an 8-bit base, on a CPU.
    """
    if use_dora and 8 in quantization.all_bits and device == "cpu":
        raise AdapterError(
            "lora.use_dora: PEFT cannot compute DoRA on an 8-bit base on a CPU; take a 4-bit base "
            "(quantization.load_in_4bit: true), a GPU, or no DoRA."
        )


def find_targets(skeleton: Skeleton, spec: LoraSpec) -> Targets:
    """The modules that `spec` names; expert routers never carry an adapter.

    Raises:
        AdapterError: a name, a pattern or an exclusion that matches nothing, or what no adapter
            can go on.
    """
    model = skeleton.model
    names = dict(model.named_modules())
    for key in ("exclude_modules", "modules_to_save"):
        _require_matches(key, getattr(spec, key), names)
    saved = _modules_to_save(spec, names)
    excluded = (*spec.exclude_modules, *skeleton.router_modules)
    left_out = {name for name in names if _ends_in(name, excluded) or _is_inside(name, saved)}
    if spec.target_modules == "all-linear":
        chosen = [name for name, module in text_modules(model) if is_linear(module)]
        if skeleton.expert_parameters:
            rewritten = {kind for kind in _kinds(chosen) if _is_rewritten(model, kind)}
            chosen = [name for name in chosen if _kind(name) not in rewritten]
    else:
        chosen = _named_targets(spec, names, left_out)
    modules = tuple(name for name in chosen if name not in left_out)
    if not modules and not saved and not spec.new_tokens:
        raise AdapterError(
            f"lora.target_modules: {_shown(spec)} matches no module that is not left out; "
            f"{_offer(names)}."
        )
    _require_patterns(spec, modules)
    _refuse_ineffective(skeleton, modules)
    return Targets(modules, _shortened(modules, names, left_out), excluded, saved)


def _named_targets(spec: LoraSpec, names: dict[str, nn.Module], left_out: set[str]) -> list[str]:
    """What a list or a regular expression selects."""
    if isinstance(spec.target_modules, str):
        pattern = re.compile(spec.target_modules)
        chosen = [name for name in names if pattern.fullmatch(name)]
    else:
        _require_matches("target_modules", spec.target_modules, names)
        chosen = [name for name in names if _ends_in(name, spec.target_modules)]
    for name in chosen:
        module = names[name]
        if name not in left_out and not is_linear(module) and not isinstance(module, nn.Embedding):
            raise AdapterError(
                f"lora.target_modules: {_shown(spec)} matches {name}, a {type(module).__name__}, "
                "and adapters go on linear layers and embeddings; name those inside it."
            )
    return chosen


def _require_matches(key: str, wanted: Iterable[str], names: Iterable[str]) -> None:
    """PEFT checks that something matched; a user means everything named to match."""
    unmatched = [one for one in wanted if not any(_ends_in(name, (one,)) for name in names)]
    if unmatched:
        raise AdapterError(
            f"lora.{key}: {', '.join(unmatched)} matches no module; {_offer(names)}."
        )


def _require_patterns(spec: LoraSpec, modules: tuple[str, ...]) -> None:
    """PEFT's rule: a regular expression for the end of a full name, after a dot."""
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in modules):
                raise AdapterError(
                    f"lora.{key}: {pattern} matches no module that carries an adapter; they are "
                    f"{', '.join(sorted(_kinds(modules)))}."
                )


def _refuse_ineffective(skeleton: Skeleton, modules: tuple[str, ...]) -> None:
    """Where an adapter would do nothing, and what PEFT would understand in its own way."""
    model = skeleton.model
    passed = sorted(_kinds(set(modules) & set(skeleton.read_directly)))
    if passed:
        raise AdapterError(
            f"lora.target_modules: {model.config.model_type} reads the weights of "
            f"{', '.join(passed)} past those layers and any adapter on them; set "
            f"lora.exclude_modules: [{', '.join(passed)}]."
        )
    for kind in sorted(_kinds(modules)):
        if _is_rewritten(model, kind):
            raise AdapterError(
                f"lora.target_modules: PEFT takes {kind} for the fused experts or the router of "
                f"{model.config.model_type}, which this version cannot merge; name other modules "
                "(those of the attention), or all-linear."
            )


def _is_rewritten(model: PreTrainedModel, kind: str) -> bool:
    """Whether PEFT translates this name from an architecture's former modules to the parameters
    that its experts are fused in now, whatever module carries the name.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[kind])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return True  # a part of what is fused now
    return bool(config.target_parameters)


def _refuse_quantized(
    skeleton: Skeleton, quantization: QuantizationSpec, saved: tuple[str, ...]
) -> None:
    """Packed numbers have no gradient, so what is trained in full must stay unquantized."""
    for name, bits in quantized_bits(skeleton, quantization).items():
        if _is_inside(name, saved):
            raise AdapterError(
                f"lora.modules_to_save: {name} is quantized to {bits} bits, and "
                "only unquantized modules can be trained in full; name it in "
                "quantization.skip_modules too, or in lora.target_modules instead."
            )


def _refuse_wrapped_embeddings(model: PreTrainedModel, targets: Targets) -> None:
    """Rows of new tokens are trained by themselves, beside nothing else on the same matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    for name, module in model.named_modules():
        if module is not embedding and module is not head:
            continue
        key = "target_modules" if name in targets.modules else ""
        if targets.saves(name):
            if module is head and not is_tied:
                continue  # the rows are trained with the rest of it
            key = "modules_to_save"
        if key:
            raise AdapterError(
                f"lora.new_tokens trains the new rows of {name}, and lora.{key} all of it; "
                "drop one of the two."
            )
        if module is head and getattr(head, "bias", None) is not None:
            remedy = "drop it" if is_tied else f"name {_kind(name)} in lora.modules_to_save"
            raise AdapterError(
                f"lora.new_tokens: PEFT leaves out the bias of {name} when it trains rows of it; "
                f"{remedy}."
            )


def _modules_to_save(spec: LoraSpec, names: Iterable[str]) -> tuple[str, ...]:
    """Full names where the ones given would mean more to PEFT, which asks no dot before them."""
    meant = [name for name in names if _ends_in(name, spec.modules_to_save)]
    taken = [name for name in names if name.endswith(spec.modules_to_save)]
    return spec.modules_to_save if meant == taken else tuple(meant)


def _shortened(
    modules: tuple[str, ...], names: Iterable[str], left_out: set[str]
) -> tuple[str, ...]:
    kinds = sorted(_kinds(modules))
    selected = {name for name in names if _ends_in(name, kinds)} - left_out
    return tuple(kinds) if selected == set(modules) else tuple(sorted(modules))


def _ends_in(name: str, ends: Iterable[str]) -> bool:
    """PEFT's rule for lists: the whole name, or its end after a dot."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _is_inside(name: str, wholes: Iterable[str]) -> bool:
    """PEFT's rule for what modules_to_save takes away from target_modules."""
    return any(re.match(rf"(^|.*\.){re.escape(whole)}($|\..*)", name) for whole in wholes)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _kinds(names: Iterable[str]) -> set[str]:
    return {_kind(name) for name in names}


def _offer(names: Iterable[str]) -> str:
    kinds = sorted(kind for kind in _kinds(names) if kind and not kind.isdigit())
    return f"the model has {', '.join(kinds)}"


def _shown(spec: LoraSpec) -> str:
    targets = spec.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets)
