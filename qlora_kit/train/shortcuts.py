"""What training does not have to compute as PEFT and transformers do: exact, tried on the model
before it is relied on, and left out, with a warning, where the trial comes out otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.model.fused.at_places import FEWEST_TOKENS, AtPlaces, last_of
from qlora_kit.model.fused.attach import Fusion, fused, plan_fusion
from qlora_kit.model.fused.lean import NO_PARTS, LeanParts, lean, looking_for_lean_parts
from qlora_kit.model.fused.products import BY_ONEDNN, BY_TORCH, reordered
from qlora_kit.model.fused.remade import Origins
from qlora_kit.model.fused.replaced import replaced_forward
from qlora_kit.model.fused.residents import ReorderedEachTime, Residents
from qlora_kit.out_of_memory import is_out_of_memory
from qlora_kit.train.kernel_choice import with_blocks, with_kernels
from qlora_kit.train.product_choice import LORA, ONEDNN
from qlora_kit.train.supervised_loss import SupervisedForward, supervised_only
from qlora_kit.train.trial import Outcome, Trial

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qlora_kit.recipe import TrainSpec

_LOSS = "the loss of supervised places alone"
_LAST_MLP = "the last MLP at supervised places alone"
_ROTARY = "rotary embeddings as one operation"
SWITCHES = ("fused_loss", "fused_lora", "fused_mlp", "fused_norm", "fused_rotary")
"""Of a recipe's `train`, each for one of them."""
_SHARDED = "the model is shared out over several GPUs"
_RAN_OUT = "memory ran out on a trial of one short sequence"


@dataclass(frozen=True)
class Shortcuts:
    """Which are taken, and why others are not."""

    supervised_loss: bool = False
    fusion: Fusion | None = None
    """Also where it covers no layer, for the reasons."""
    difference: float = 0.0
    """Of the gradients on a trial, relative."""
    left: tuple[str, ...] = ()
    """What was asked for and cannot be, and why."""
    lean: LeanParts = NO_PARTS
    """MLPs, norms and rotary embeddings that keep or take less."""
    liger: tuple[str, ...] = ()
    """Which of them Liger's kernels compute, of `model.fused.liger.OPERATIONS`."""
    last_mlp: str | None = None
    """That of the last layer, where it computes at supervised places alone."""
    onednn: bool = False
    """Whether oneDNN multiplies with frozen weights."""
    onednn_logits: bool = False
    """Whether it makes the logits, where torch does all else."""
    reorders: bool = False
    """Whether those that stay lie in oneDNN's own layout, too: the same bits."""
    blockwise: bool = False
    """Whether attention over a long example goes in blocks of queries."""
    why_kernels: str = ""
    """By what that was chosen, in a few words; empty where there is nothing to say."""


NONE = Shortcuts()


def choose_shortcuts(
    model: PeftModel, spec: TrainSpec, precision: str, is_sharded: bool, longest: int = 0
) -> Shortcuts:
    """Try what the recipe allows on a short batch: all at once, and where that comes out
    otherwise, one after the other.

    Args:
        precision: bf16, fp16 or fp32, of autocast.
        longest: tokens of the longest example that attention in blocks covers, of those that are
            attended to by themselves; 0: there is none.
    """
    if is_sharded:
        is_asked_for = _is_any_on(spec) or True in (spec.use_onednn, spec.blockwise_attention)
        return Shortcuts(left=(_SHARDED,)) if is_asked_for else NONE
    trial = Trial(model, model.get_base_model(), precision)
    return with_blocks(trial, _of_a_batch(trial, spec), spec, longest)


def _is_any_on(spec: TrainSpec) -> bool:
    return any(getattr(spec, name) for name in SWITCHES)


def _of_a_batch(trial: Trial, spec: TrainSpec) -> Shortcuts:
    if not _is_any_on(spec):
        is_asked_for = spec.use_onednn is True
        return Shortcuts(left=(f"{ONEDNN}: it comes with {LORA}",)) if is_asked_for else NONE
    model = trial.model
    with trial.stirred():
        try:
            with looking_for_lean_parts(model) as seen:
                wanted = trial.outcome()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Shortcuts(left=(_RAN_OUT,))
        candidates, left = _candidates(spec, trial, seen.parts)
        found, why = _tried(trial, wanted, NONE, [one for _, one in candidates])
        if why is not None:
            found = NONE
            for name, changes in candidates:
                found, why = _tried(trial, wanted, found, [changes])
                if why is not None:
                    left.append(f"{name}: {why}")
            if not found.supervised_loss:  # by which alone it is known where they are
                found = replace(found, last_mlp=None)
        found, without = with_kernels(
            trial, lambda so_far, change: _tried(trial, wanted, so_far, [change]), found, spec
        )
    return replace(found, left=(*left, *without))


def _candidates(
    spec: TrainSpec, trial: Trial, parts: LeanParts
) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """(what may be taken, each with its name for people and the fields that it sets; why not)"""
    model = trial.model
    candidates: list[tuple[str, Mapping[str, Any]]] = []
    left = []
    if spec.fused_loss:
        why = why_no_supervised_loss(model.get_base_model())
        if why is None:
            candidates.append((_LOSS, {"supervised_loss": True}))
        else:
            left.append(f"{_LOSS}: {why}")
    if spec.fused_lora:
        candidates.append((LORA, {"fusion": plan_fusion(model, trial.forward)}))
    if spec.fused_mlp and parts.mlps:
        candidates.append(("MLPs that keep less", {"lean": LeanParts(mlps=parts.mlps)}))
    last_mlp = last_of(model, parts.mlps) if spec.fused_mlp and spec.fused_loss else None
    if last_mlp is not None and not left:
        is_read_elsewhere = trial.is_read_elsewhere(last_mlp)
        if is_read_elsewhere:
            left.append(f"{_LAST_MLP}: the loss depends on what it gives at others")
        elif is_read_elsewhere is not None:
            candidates.append((_LAST_MLP, {"last_mlp": last_mlp}))
    if spec.fused_norm and parts.num_norms:
        candidates.append(("norms that keep less", {"lean": parts.all_norms}))
    if spec.fused_rotary and parts.rotary:
        candidates.append((_ROTARY, {"lean": LeanParts(rotary=parts.rotary)}))
    return candidates, left


def _tried(
    trial: Trial,
    wanted: Outcome,
    so_far: Shortcuts,
    changes: Sequence[Mapping[str, Any]],
) -> tuple[Shortcuts, str | None]:
    """(with the changes, or as it was where they come out otherwise; what was wrong)"""
    attempt = so_far
    for one in changes:
        lean = attempt.lean.joined(one.get("lean", NO_PARTS))
        attempt = replace(attempt, **{**one, "lean": lean})
    residents = ReorderedEachTime(reorder=reordered) if attempt.reorders else None
    with taken(trial.model, attempt, residents, least_tokens=1):
        why, apart = trial.compared(wanted)
    if why is not None:
        return so_far, why
    return replace(attempt, difference=apart), None


@contextmanager
def taken(
    model: PeftModel,
    shortcuts: Shortcuts,
    residents: Residents | None = None,
    least_tokens: int = FEWEST_TOKENS,
) -> Iterator[None]:
    """Compute so, while the context lasts.

    Args:
        residents: frozen weights that stay.
        least_tokens: of a batch at some of whose places the last MLP computes nothing.
    """
    origins = Origins()
    with ExitStack() as stack:
        if shortcuts.supervised_loss:
            stack.enter_context(supervised_only(model.get_base_model()))
        if shortcuts.fusion is not None:
            products = BY_ONEDNN if shortcuts.onednn else BY_TORCH
            of_logits = BY_ONEDNN if shortcuts.onednn_logits else None
            how = (origins, residents, products, of_logits)
            stack.enter_context(fused(model, shortcuts.fusion, *how))
        stack.enter_context(lean(model, shortcuts.lean, origins, shortcuts.liger))
        loss = model.get_base_model().forward
        if shortcuts.last_mlp is not None and isinstance(loss, SupervisedForward):
            mlp = model.get_submodule(shortcuts.last_mlp)
            narrowed = AtPlaces(mlp.forward, loss.places, least_tokens)
            stack.enter_context(replaced_forward(mlp, narrowed))
        yield


def why_no_supervised_loss(model: PreTrainedModel) -> str | None:
    """What a trial would not show."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return "its loss has a part for the experts' routers"
    if model.base_model is model:
        return "its backbone is not apart from its head"
    return None
