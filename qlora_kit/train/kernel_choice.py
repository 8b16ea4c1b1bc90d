"""Which kernels a run takes beside torch's own: those that give the same and win a race."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora_kit.model.blockwise_attention import FEWEST_TOKENS, MOST_TOKENS
from qlora_kit.model.fused.lean import NO_PARTS
from qlora_kit.model.fused.liger import GATED, NORM, ROTARY, why_no_liger
from qlora_kit.model.heads import heads_of
from qlora_kit.train.kernel_race import (
    Pair,
    Raced,
    attention_pair,
    pair_of,
    raced_on_a_cpu,
    raced_on_a_gpu,
    raced_or_why,
    timed_tokens,
    timed_tokens_of,
)
from qlora_kit.train.product_choice import Tried, with_products
from qlora_kit.train.trial import Trial

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.shortcuts import Shortcuts

LIGER_PARTS = {NORM: "norms", GATED: "gated MLPs", ROTARY: "rotary embeddings"}
_LIGER = "Liger's kernels"
BLOCKS = "attention in blocks"
# What configurations call it.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def with_kernels(
    trial: Trial, tried: Tried, found: Shortcuts, spec: TrainSpec
) -> tuple[Shortcuts, list[str]]:
    """(with those of other libraries that are exact and gain; what fails, and why)"""
    found, without_liger = _with_liger(trial, tried, found, spec)
    found, without_onednn = with_products(trial, tried, found, spec)
    return found, [*without_liger, *without_onednn]


def with_blocks(trial: Trial, found: Shortcuts, spec: TrainSpec, longest: int) -> Shortcuts:
    """With attention in blocks, where it is exact and gains.

    Args:
        longest: tokens of the longest example that blocks cover, of those that attention takes by
            themselves; 0: there is none.
    """
    if not spec.blockwise_attention:
        return found
    is_asked_for = spec.blockwise_attention is True
    heads = heads_of(trial.model)
    num_tokens = timed_tokens_of(longest)
    why = _why_no_blocks(trial, num_tokens)
    if why is None and heads is None:
        why = "the configuration does not say how many heads there are"
    if why is not None or heads is None:
        return _without(found, f"{BLOCKS}: {why}") if is_asked_for else found
    one, fault = raced_or_why(
        lambda: attention_pair(heads, num_tokens, trial.dtype),
        raced_on_a_cpu,
        trial.precision,
        num_tokens,
    )
    if one is None:
        return _without(found, f"{BLOCKS}: {fault}")
    takes = one.is_faster or is_asked_for
    whose = "blocks of queries" if takes else "torch's own"
    told = f"{whose} for attention ({one.gain:.2f} ×): time of torch's over that of blocks on "
    kernels = "; ".join(filter(None, (found.why_kernels, f"{told}{num_tokens} tokens")))
    return replace(found, blockwise=takes, why_kernels=kernels)


def _why_no_blocks(trial: Trial, num_tokens: int) -> str | None:
    """What is in the way of blocks; None where nothing is."""
    if trial.device.type != "cpu":
        return "they are for a CPU"
    most = MOST_TOKENS.get(trial.dtype)
    if most is None:
        return f"they are not for {trial.dtype}"
    config: Any = trial.model.config
    text = config.get_text_config()
    if any(getattr(text, name, 0.0) for name in _DROPOUTS):
        return "the model drops out of its attention at random"
    if not num_tokens:
        return (
            f"no example of {FEWEST_TOKENS} to {most:,} tokens is attended to by itself "
            "(data.padding_free, data.packing)"
        )
    return None


def _without(found: Shortcuts, why: str) -> Shortcuts:
    return replace(found, left=(*found.left, why))


def _with_liger(
    trial: Trial, tried: Tried, found: Shortcuts, spec: TrainSpec
) -> tuple[Shortcuts, list[str]]:
    if not spec.use_liger_kernel or found.lean == NO_PARTS:
        return found, []
    is_asked_for = spec.use_liger_kernel is True
    why = why_no_liger(trial.device)
    if why is not None:
        if is_asked_for:
            return found, [f"{_LIGER}: {why}"]
        is_told = trial.device.type == "cuda"
        return replace(found, why_kernels=f"torch's own ({_LIGER}: {why})" * is_told), []
    left = []
    times: dict[str, Raced] = {}
    for name, part in LIGER_PARTS.items():
        change = {"liger": (*found.liger, name)}
        found, one, fault = _with_kernel(
            name, change, raced_on_a_gpu, trial, tried, found, is_asked_for
        )
        if one is not None:
            times[name] = one
        if fault is not None:
            left.append(f"{_LIGER} for {part}: {fault}")
    return replace(found, why_kernels=_told(found, times)), left


def _with_kernel(
    name: str,
    change: Mapping[str, Any],
    race: Callable[[Pair], Raced],
    trial: Trial,
    tried: Tried,
    found: Shortcuts,
    is_asked_for: bool,
) -> tuple[Shortcuts, Raced | None, str | None]:
    """(with it where it is exact and gains, how fast it is, what is wrong with it)"""
    one, fault = raced_or_why(
        lambda: pair_of(name, trial.model, found.lean, trial.dtype),
        race,
        trial.precision,
        timed_tokens(name),
    )
    if one is None or not (one.is_faster or is_asked_for):
        return found, one, fault
    found, fault = tried(found, change)
    return found, one if fault is None else None, fault


def _told(found: Shortcuts, times: Mapping[str, Raced]) -> str:
    """How fast each of Liger's kernels is, and which are taken."""
    if not times:
        return ""
    taken = [name for name in times if name in found.liger]
    others = [name for name in times if name not in found.liger]
    parts = []
    for whose, names in (("Liger's", taken), ("torch's own", others)):
        each = (f"{LIGER_PARTS[name]} ({times[name].gain:.2f} ×)" for name in names)
        if names:
            parts.append(f"{whose} for {', '.join(each)}")
    return "; ".join(parts) + f": time of torch's over Liger's on {timed_tokens(NORM):,} tokens"
