"""Attach a LoRA adapter to a base, and count what it trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base, count_quantized
from qlora_kit.model.loftq import fit_to_quantization_error
from qlora_kit.model.skeleton import Skeleton

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from qlora_kit.recipe import LoraSpec

# Names that PEFT translates to fused expert parameters and routers, whatever carries them.
_NAMES_OF_FUSED_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Adapted:
    """A base with its adapter, and the true counts."""

    model: PeftModel
    num_trainable: int
    num_parameters: int
    """Base and adapter; packed 4-bit weights counted as the parameters they stand for."""
    targets: dict[str, int]
    """Kind of module → how many carry an adapter."""


def attach_adapter(base: Base, spec: LoraSpec, seed: int) -> Adapted:
    """Add a fresh adapter; the same seed gives the same one.

    Raises:
        AdapterError: targets, patterns or modules_to_save that match nothing.
    """
    import transformers
    from peft import get_peft_model

    transformers.set_seed(seed)
    token_ids = add_tokens(base, spec.new_tokens)
    config = lora_config(base, spec, token_ids)
    _refuse_unmatched(base.model, spec)
    try:
        model = get_peft_model(base.model, config, revision=base.source.revision)
    except (ValueError, RuntimeError, TypeError) as error:
        raise AdapterError(f"lora: {str(error).strip().splitlines()[0]}") from error
    if model.peft_config["default"].target_parameters:
        raise AdapterError(
            f"lora.target_modules: {spec.target_modules!r} reaches fused experts or their router, "
            "which this version cannot merge; name the attention's modules, or use all-linear."
        )
    adapted = describe_adapted(model)
    if not adapted.targets and not spec.modules_to_save and not token_ids:
        raise AdapterError(f"lora.target_modules: {spec.target_modules!r} matches no module.")
    if spec.init == "loftq":
        fit_to_quantization_error(model, base.source.folder)
    return adapted


def lora_config(base: Base, spec: LoraSpec, token_ids: list[int]) -> LoraConfig:
    """The one place that builds it."""
    from peft import LoraConfig

    targets = spec.target_modules
    if targets == "all-linear" and base.skeleton.expert_parameters:
        targets = linear_beside_experts(base.skeleton)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=[*spec.exclude_modules, *base.skeleton.router_modules] or None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),  # type: ignore[arg-type]
        modules_to_save=list(spec.modules_to_save) or None,
        trainable_token_indices=_token_targets(base, token_ids),
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        bias="none",
    )


def linear_beside_experts(skeleton: Skeleton) -> tuple[str, ...]:
    """What all-linear means where experts are fused: the linear layers outside them.

    PEFT would read the shorthand as the model of old, with every expert and the router in it.
    """
    leaves = {
        name.rpartition(".")[2]
        for name in skeleton.linear_modules
        if name not in skeleton.router_modules
    }
    return tuple(sorted(leaves - _NAMES_OF_FUSED_EXPERTS))


def add_tokens(base: Base, tokens: tuple[str, ...]) -> list[int]:
    """Add tokens to the vocabulary, growing the embeddings where they have no spare rows.

    Raises:
        AdapterError: a token is known already.
    """
    if not tokens:
        return []
    known = [token for token in tokens if token in base.tokenizer.get_vocab()]
    if known:
        raise AdapterError(f"lora.new_tokens: the vocabulary has {', '.join(known)} already.")
    base.tokenizer.add_tokens(list(tokens), special_tokens=False)
    if len(base.tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=True)
    return [base.tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _token_targets(base: Base, token_ids: list[int]) -> dict[str, list[int]] | None:
    """Embedding and, where it is a matrix of its own, the head: both need the new rows."""
    if not token_ids:
        return None
    names = {id(module): name for name, module in base.model.named_modules()}
    embedding = names[id(base.model.get_input_embeddings())].rpartition(".")[2]
    targets = {embedding: token_ids}
    if not base.model.config.get_text_config().tie_word_embeddings:
        targets[names[id(base.model.get_output_embeddings())].rpartition(".")[2]] = token_ids
    return targets


def _refuse_unmatched(model: nn.Module, spec: LoraSpec) -> None:
    """PEFT checks that something matched; a user means everything named to match."""
    names = [name for name, _ in model.named_modules()]
    leaves = sorted({name.rpartition(".")[2] for name in names} - {""})
    wanted = {
        "modules_to_save": spec.modules_to_save,
        "exclude_modules": spec.exclude_modules,
    }
    if not isinstance(spec.target_modules, str):
        wanted["target_modules"] = spec.target_modules
    for key, modules in wanted.items():
        unmatched = [
            one for one in modules if not any(n == one or n.endswith(f".{one}") for n in names)
        ]
        if unmatched:
            raise AdapterError(
                f"lora.{key}: {', '.join(unmatched)} matches no module; the model has "
                f"{', '.join(leaf for leaf in leaves if not leaf.isdigit())}."
            )
    for key, pattern in (
        ("rank_pattern", spec.rank_pattern),
        ("alpha_pattern", spec.alpha_pattern),
    ):
        from peft.utils.other import get_pattern_key

        for one in pattern:
            if not any(get_pattern_key([one], name) == one and _hits(one, name) for name in names):
                raise AdapterError(f"lora.{key}: {one} matches no module.")


def _hits(pattern: str, name: str) -> bool:
    import re

    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def describe_adapted(model: PeftModel) -> Adapted:
    """Count trainable and total parameters, and the modules that carry an adapter."""
    from peft.tuners.lora import LoraLayer

    targets = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(model, trainable, count_quantized(model).num_parameters, dict(targets))


def require_float32_trainables(model: nn.Module) -> None:
    """Trainable parameters in 16 bits lose small updates: at 2e-5, nine in ten of them.

    Raises:
        AssertionError: something cast them down; our bug, not the user's.
    """
    down = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not down, f"trainable parameters are not float32: {down[:3]}"
