"""Attach a LoRA adapter to a base, and count what it trains."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_kit.errors import AdapterError
from qlora_kit.model.base import Base, num_embeddings
from qlora_kit.model.loftq import fit_to_quantization_error
from qlora_kit.model.qat.attach import make_aware, trained_in_full
from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.quantized import count_quantized
from qlora_kit.model.reason import reason_of
from qlora_kit.model.targets import Targets, find_targets
from qlora_kit.recipe import LoraSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

    from qlora_kit.model.skeleton import Skeleton


@dataclass(frozen=True)
class Adapted:
    """A base with its adapter, and the true counts."""

    model: PeftModel
    num_trainable: int
    num_parameters: int
    """Base and adapter; packed 4-bit weights counted as the parameters they stand for."""
    targets: dict[str, int]
    """Kind of module → how many carry an adapter."""
    in_full: dict[str, int]
    """Kind of module → how many are trained in full."""


def attach_adapter(base: Base, spec: LoraSpec, seed: int, aware: Aware | None = None) -> Adapted:
    """Add a fresh adapter; the same seed gives the same one. With `aware` the merged weights are
    quantized whenever the model computes; where that trains the weights themselves, copies of the
    layers are the adapter, and not what `spec` says.

    Raises:
        AdapterError: targets, patterns or modules_to_save that match nothing or cannot be trained.
    """
    import transformers
    from peft import get_peft_model

    transformers.set_seed(seed)
    is_full = aware is not None and aware.spec.train == "full"
    if is_full:
        spec = _in_full(base.skeleton)
    targets = find_targets(base.skeleton, spec)
    token_ids = add_tokens(base, spec.new_tokens)
    config = lora_config(base, spec, targets, token_ids)
    try:
        model = get_peft_model(base.model, config, revision=base.source.revision)
    except (ValueError, RuntimeError, TypeError) as error:
        raise AdapterError(f"lora: {reason_of(error)}") from error
    if base.source.kind == "hub":  # where others find it, not where it lies on this machine
        model.peft_config["default"].base_model_name_or_path = base.source.name
    _train_in_float32(model)
    if spec.init == "loftq":
        fit_to_quantization_error(model, base)
    make_aware(base.model, base.skeleton, aware, base.compute_dtype)
    adapted = describe_adapted(model)
    # The copies stand in for the base's own, which are kept to be compared with.
    return replace(adapted, num_parameters=base.quantized.num_parameters) if is_full else adapted


def _in_full(skeleton: Skeleton) -> LoraSpec:
    """No low-rank update, which PEFT lets pass under this name alone, and trained copies."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return LoraSpec(target_modules=DUMMY_TARGET_MODULES, modules_to_save=trained_in_full(skeleton))


def lora_config(base: Base, spec: LoraSpec, targets: Targets, token_ids: list[int]) -> LoraConfig:
    """The one place that builds it."""
    from peft import LoraConfig

    is_pattern = isinstance(spec.target_modules, str) and spec.target_modules != "all-linear"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules if is_pattern else list(targets.named),
        exclude_modules=list(targets.excluded) or None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),  # type: ignore[arg-type]
        modules_to_save=list(targets.modules_to_save) or None,
        trainable_token_indices=_token_targets(base, targets, token_ids),
        init_lora_weights="gaussian" if spec.init == "gaussian" else True,
        bias="none",
    )


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
    if len(base.tokenizer) > num_embeddings(base.model):
        base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=True)
    ids = base.tokenizer.convert_tokens_to_ids(list(tokens))
    assert isinstance(ids, list)
    return ids


def _token_targets(
    base: Base, targets: Targets, token_ids: list[int]
) -> dict[str, list[int]] | None:
    """Embedding and, where it is a matrix of its own, the head: both need the new rows."""
    if not token_ids:
        return None
    embedding, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    names = {id(module): name for name, module in base.model.named_modules()}
    rows = {names[id(embedding)].rpartition(".")[2]: token_ids}
    is_tied = head is None or head.weight is embedding.weight
    if not is_tied and not targets.saves(names[id(head)]):
        rows[names[id(head)].rpartition(".")[2]] = token_ids
    return rows


def _train_in_float32(model: nn.Module) -> None:
    """PEFT casts its own matrices up, but not the copies that modules_to_save makes."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def describe_adapted(model: PeftModel) -> Adapted:
    """Count trainable and total parameters, and the modules that carry an adapter."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(
        model=model,
        num_trainable=trainable,
        num_parameters=count_quantized(model).num_parameters,
        targets=_kinds(model, LoraLayer),
        in_full=_kinds(model, ModulesToSaveWrapper),
    )


def _kinds(model: nn.Module, of: type[nn.Module]) -> dict[str, int]:
    """How many modules of a class there are, by the last part of their names."""
    named = (name for name, module in model.named_modules() if isinstance(module, of))
    return dict(Counter(name.rpartition(".")[2] for name in named))


def require_float32_trainables(model: nn.Module) -> None:
    """Trainable parameters in 16 bits lose small updates: at 2e-5, nine in ten of them.

    Raises:
        AssertionError: something cast them down; our bug, not the user's.
    """
    down = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not down, f"trainable parameters are not float32: {down[:3]}"
