"""Whether oneDNN multiplies with frozen weights, and in which layout those that stay lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit import kept
from qlora_kit.model.fused.lean import NO_PARTS
from qlora_kit.model.fused.products import why_no_onednn, why_no_reordered
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.train.facts import facts_of_machine
from qlora_kit.train.kernel_race import (
    FEWEST_WEIGHTS,
    LAYOUT,
    LEAST_GAIN,
    LOGITS,
    PRODUCTS,
    Raced,
    most_weights,
    pair_of,
    raced_on_a_cpu,
    raced_or_why,
    timed_sizes,
    timed_tokens,
)
from qlora_kit.train.trial import Trial

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.shortcuts import Shortcuts

_KIND = "races"  # in the cache
LORA = "LoRA as one operation"
ONEDNN = "oneDNN's products"
ONEDNN_LOGITS = "oneDNN's logits"
# Of oneDNN's products with other weights, where it gains with those that stay.
_LITTLE_LESS = 0.97
# Of the layout: where a clock was wrong about it, nothing but memory is lost.
_LEAST_GAIN_OF_LAYOUT = 1.01

Tried = Callable[["Shortcuts", Mapping[str, Any]], "tuple[Shortcuts, str | None]"]
"""(with a change, or as it was where it comes out otherwise on the model; what was wrong)"""


@dataclass(frozen=True)
class _Races:
    """Of oneDNN against torch, and of its own layout against torch's."""

    products: Raced | None
    """None: torch multiplies by oneDNN itself, in 16 bits; the same bits in either layout."""
    layout: Raced | None
    """None: it cannot be taken."""
    logits: Raced | None = None
    """None: nobody asked, as the head goes with the layers, has an adapter, or is small."""

    def is_taken(self) -> bool:
        """Also where it loses a little with other weights: the bits then do not depend on whether
        there is room for them to stay.
        """
        if self.products is None:
            return False
        gain = self.products.gain * (self.layout.gain if self.layout is not None else 1.0)
        is_little_less = self.products.gain >= _LITTLE_LESS and self.gains_by_layout()
        return self.products.is_faster or (is_little_less and gain >= LEAST_GAIN)

    def gains_by_layout(self) -> bool:
        return self.layout is not None and self.layout.gain >= _LEAST_GAIN_OF_LAYOUT

    def chosen(self, is_asked_for: bool) -> tuple[bool, bool]:
        """(whether oneDNN multiplies; whether with weights in its layout)"""
        onednn = self.products is not None and (self.is_taken() or is_asked_for)
        reorders = self.layout is not None and (self.gains_by_layout() or is_asked_for)
        return onednn, reorders and (onednn or self.products is None)

    def told(self, found: Shortcuts, model: nn.Module) -> str:
        """What was chosen, and by which figures; empty where nothing was timed."""
        timed = []
        parts = []
        if self.products is not None:
            whose = "oneDNN's" if found.onednn else "torch's own"
            parts.append(f"{whose} for products ({self.products.gain:.2f} ×)")
        if self.logits is not None:
            whose = "oneDNN's" if found.onednn_logits else "torch's own"
            parts.append(f"{whose} for logits ({self.logits.gain:.2f} ×)")
            timed.append(f"{_told_sizes(model, LOGITS)} of the head")
        if self.layout is not None:
            whose = "oneDNN's layout" if found.reorders else "torch's layout"
            parts.append(f"{whose} for weights that stay ({self.layout.gain:.2f} ×)")
        if self.products is not None or self.layout is not None:
            timed.insert(0, f"a layer of {_told_sizes(model, PRODUCTS)}")
        if not timed:
            return ""
        return (
            f"{', '.join(parts)}: time of torch's over oneDNN's on {timed_tokens(PRODUCTS)} tokens "
            f"of {' and '.join(timed)}"
        )


def _told_sizes(model: nn.Module, operation: str) -> str:
    height, width = timed_sizes(model, operation) or (0, 0)
    return f"{height:,} × {width:,}"


def with_products(
    trial: Trial, tried: Tried, found: Shortcuts, spec: TrainSpec
) -> tuple[Shortcuts, list[str]]:
    """(with what is exact and gains; what fails, and why)"""
    if not spec.use_onednn:
        return found, []
    is_asked_for = spec.use_onednn is True
    why = why_no_reordered(trial.device, trial.dtype)
    if why is None and found.fusion is None:
        why = f"it comes with {LORA}"
    if why is None and most_weights(trial.model) is None:
        why = "no frozen layer has an adapter"
    if why is not None:
        return found, [f"{ONEDNN}: {why}"] * is_asked_for
    races: _Races | None = _Races(None, None)
    left: list[str] = []
    if is_worth_a_race(trial.model, spec):
        races, left = _raced(trial.model, spec, trial.device, trial.dtype, trial.precision)
    if races is None:
        return found, left
    onednn, reorders = races.chosen(is_asked_for)
    if not onednn and why_no_onednn(trial.device, trial.dtype) is None:
        races, found, faults = _with_logits(races, trial, tried, found)
        left += faults
    if onednn or reorders:
        found, fault = tried(found, {"onednn": onednn, "reorders": reorders})
        if fault is not None and reorders and onednn:
            left.append(f"{ONEDNN} with weights in its layout: {fault}")
            found, fault = tried(found, {"onednn": True})
        if fault is not None:
            return found, [*left, f"{ONEDNN}: {fault}"]
    told = "; ".join(filter(None, (found.why_kernels, races.told(found, trial.model))))
    return replace(found, why_kernels=told), left


def _with_logits(
    races: _Races, trial: Trial, tried: Tried, found: Shortcuts
) -> tuple[_Races, Shortcuts, list[str]]:
    """(with the race of the head; with its products by oneDNN where they gain; what fails, why)

    torch's own may be good for layers, and far behind where an output is as wide as a vocabulary.
    """
    sizes = timed_sizes(trial.model, LOGITS)
    if sizes is None or sizes[0] * sizes[1] < FEWEST_WEIGHTS:
        return races, found, []
    how = (trial.model, trial.device, trial.dtype, trial.precision)
    logits, fault = _known_or_raced(LOGITS, *how)
    if logits is not None and logits.is_faster:
        found, fault = tried(found, {"onednn_logits": True})
    why = [] if fault is None else [f"{ONEDNN_LOGITS}: {fault}"]
    return replace(races, logits=logits), found, why


def will_reorder(
    model: nn.Module, spec: TrainSpec, device: torch.device, dtype: torch.dtype, precision: str
) -> bool:
    """Whether training on this machine lets weights that stay lie in oneDNN's layout, as far as
    that goes by time; it is timed where no start has done so yet.

    Args:
        model: of tensors without numbers, too.
    """
    if not may_reorder(model, spec, device, dtype):
        return False
    races, _ = _raced(model, spec, device, dtype, precision)
    return races is not None and races.chosen(spec.use_onednn is True)[1]


def may_reorder(
    model: nn.Module, spec: TrainSpec, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether it may come about that weights that stay lie in oneDNN's layout."""
    if not spec.use_onednn or not spec.fused_lora or not may_stay(spec):
        return False
    if fake_quantization_of(model) is not None:  # whose layers come to multiply with others
        return False
    return is_worth_a_race(model, spec) and why_no_reordered(device, dtype) is None


def is_worth_a_race(model: nn.Module, spec: TrainSpec) -> bool:
    """Whether products take long enough to be timed, or need not be."""
    sizes = most_weights(model)
    is_asked_for = spec.use_onednn is True
    return sizes is not None and (is_asked_for or sizes[0] * sizes[1] >= FEWEST_WEIGHTS)


def may_stay(spec: TrainSpec) -> bool:
    """Whether weights may stay unpacked: not where all layers recompute."""
    return spec.gradient_checkpointing is not True


def _raced(
    model: nn.Module, spec: TrainSpec, device: torch.device, dtype: torch.dtype, precision: str
) -> tuple[_Races | None, list[str]]:
    """(None where there is nothing to choose; what fails, and why)"""
    how = (model, device, dtype, precision)
    products = None
    if why_no_onednn(device, dtype) is None:
        products, fault = _known_or_raced(PRODUCTS, *how)
        if products is None:
            return None, [] if fault is None else [f"{ONEDNN}: {fault}"]
    layout, fault = None, None
    if may_stay(spec) and fake_quantization_of(model) is None:
        layout, fault = _known_or_raced(LAYOUT, *how)
    if layout is not None and layout.apart:
        layout = None
        fault = "other bits come out" if spec.use_onednn is True else None
    left = [] if fault is None else [f"{ONEDNN} with weights in its layout: {fault}"]
    if products is None and layout is None:
        return None, left
    return _Races(products, layout), left


def _known_or_raced(
    operation: str, model: nn.Module, device: torch.device, dtype: torch.dtype, precision: str
) -> tuple[Raced | None, str | None]:
    """What an earlier start or plan has timed on this machine, else timed now and kept: a clock
    that is near to a tie would tell a plan otherwise than the training that it is for.
    """
    key = kept.key_of(
        {
            **facts_of_machine(device),
            "operation": operation,
            "sizes": timed_sizes(model, operation),
            "dtype": dtype,
            "precision": precision,
            "threads": torch.get_num_threads(),
        }
    )
    values = kept.recall(_KIND, key)
    if values is not None:
        return Raced(**values), None
    found, fault = raced_or_why(
        lambda: pair_of(operation, model, NO_PARTS, dtype),
        raced_on_a_cpu,
        precision,
        timed_tokens(operation),
    )
    if found is not None:
        kept.keep(_KIND, key, asdict(found))
    return found, fault
