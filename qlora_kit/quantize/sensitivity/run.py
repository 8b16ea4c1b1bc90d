"""From what a user asks to a measurement, and the mixture that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.atomic import draft_beside
from qlora_kit.environment import probe_hardware, resolve_compute_dtype
from qlora_kit.errors import ModelError, RunError
from qlora_kit.model.base import Base, base_tokenizer, load_base, refuse_unquantizable
from qlora_kit.model.find import find_skeleton
from qlora_kit.model.prequantized import prequantized_settings
from qlora_kit.quantize.mixed import require_room
from qlora_kit.quantize.mixed_base import (
    Chosen,
    choose_mixture,
    narrowest_bytes,
    require_loadable,
    uniform_base,
)
from qlora_kit.quantize.progressive import Descent, descend
from qlora_kit.quantize.rounding import Rounding
from qlora_kit.quantize.sensitivity.measure import (
    Plan,
    Sensitivity,
    measure_sensitivity,
    reference_of,
)
from qlora_kit.quantize.sensitivity.reference import Reference
from qlora_kit.quantize.sensitivity.text import deal, read_rows
from qlora_kit.quantize.sensitivity.units import By
from qlora_kit.quantize.texts import require_rows
from qlora_kit.recipe import ModelSpec, QuantizationSpec
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import context_tokens

if TYPE_CHECKING:
    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.model.skeleton import Skeleton

DEFAULT_WINDOW = 256


@dataclass(frozen=True)
class Request:
    """What a user asks of `sensitivity`."""

    data: str
    rounding: Rounding
    by: By = "layer"
    is_exact: bool = True
    check: int = 0
    num_tokens: int = 1024
    window_tokens: int | None = None
    """Of a row at most; unset: 256, or as many as the model attends to, where those are fewer."""
    seed: int = 42
    stability: bool = False
    budget_bytes: int | None = None
    max_kl: float | None = None
    num_steps: int | None = None
    """With `max_kl`: go down from 16 bits in this many steps a width, and stop there."""
    out: Path | None = None

    @property
    def chooses(self) -> bool:
        return self.budget_bytes is not None or self.max_kl is not None


def run_sensitivity(
    spec: ModelSpec, request: Request, reporter: Reporter = SILENT
) -> tuple[Sensitivity, Chosen | Descent | None]:
    """Measure, and choose a mixture where a budget is named.

    A mixture is measured on rows that the ranking has not seen.

    Raises:
        QloraKitError: whatever is at fault, before anything is measured.
    """
    if request.out is not None:
        require_writable(request.out)
    if request.chooses:
        require_loadable(request.rounding)
    require_rows(request.data, "train")
    first, other = examine(spec, request)
    base = load_reference(spec, reporter)
    _tell_of_experts(base, reporter)
    plan = Plan(request.rounding, request.by, request.is_exact, request.check, request.seed)
    others = other if request.stability else None
    found = measure_sensitivity(base, first, plan, others, reporter)
    if not request.chooses:
        return found, None
    assert other is not None
    with reference_of(base, other, reporter) as reference:
        return found, _choose(base, found, reference, request, reporter)


def examine(
    spec: ModelSpec, request: Request
) -> tuple[list[TokenSequence], list[TokenSequence] | None]:
    """Disjoint rows: to rank on, and where asked to measure on; once all is right that can be told
    without the weights.

    Raises:
        ModelError: the model is stored quantized, cannot be loaded as a mixture or is too large for
            the budget, or attends to fewer tokens than a row is to have.
        DataError: there are too few rows.
    """
    source, skeleton = find_skeleton(spec)
    if prequantized_settings(skeleton) is not None:
        raise ModelError(
            f"{source.name} is stored quantized, so there is nothing to compare with; take the "
            "model in 16 bits."
        )
    if request.chooses:
        refuse_unquantizable(skeleton, uniform_base(request.rounding))
    if request.budget_bytes is not None:
        require_room(narrowest_bytes(skeleton, request.rounding), request.budget_bytes)
    window_tokens = _window_tokens(request.window_tokens, source.name, skeleton)
    rows = read_rows(request.data, base_tokenizer(source, spec))
    num_sets = 2 if request.stability or request.chooses else 1
    sets = deal(rows, num_sets, request.num_tokens, window_tokens, request.seed)
    return sets[0], sets[1] if num_sets > 1 else None


def require_writable(out: Path) -> None:
    """
    Raises:
        RunError: something is there already, or nothing can be made there.
    """
    if out.exists():
        raise RunError(f"{out} exists already; remove it, or name another folder.")
    with draft_beside(out):
        pass


def _tell_of_experts(base: Base, reporter: Reporter) -> None:
    names = base.skeleton.expert_parameters
    if names:
        sizes = {name: one.numel() for name, one in base.skeleton.model.named_parameters()}
        share = sum(sizes[name] for name in names) / sum(sizes.values())
        reporter.warn(
            f"{share:.0%} of the parameters are fused experts ({names[0]} …), which are no linear "
            "modules: they are not ranked, and stay as they are."
        )


def _choose(
    base: Base, found: Sensitivity, reference: Reference, request: Request, reporter: Reporter
) -> Chosen | Descent:
    if request.num_steps is not None:
        assert request.max_kl is not None
        return descend(
            base,
            found,
            reference,
            max_kl=request.max_kl,
            num_steps=request.num_steps,
            reporter=reporter,
        )
    return choose_mixture(
        base,
        found,
        reference,
        budget_bytes=request.budget_bytes,
        max_kl=request.max_kl,
        reporter=reporter,
    )


def load_reference(spec: ModelSpec, reporter: Reporter = SILENT) -> Base:
    """A model in the precision that everything is measured against."""
    hardware = probe_hardware()
    dtype, why = resolve_compute_dtype("auto", hardware)
    quantization = QuantizationSpec(load_in_4bit=False)
    base = load_base(spec, quantization, getattr(torch, dtype), why, hardware)
    reporter.say(f"reference {base.source.name} in {dtype} ({why})")
    return base


def _window_tokens(asked: int | None, name: str, skeleton: Skeleton) -> int:
    """Tokens of a row at most; unasked as many as the model attends to, and 256 at most.

    Raises:
        ModelError: more were asked for than it attends to.
    """
    context = context_tokens(skeleton.model)
    if context is None:
        return asked or DEFAULT_WINDOW
    if asked is not None and asked > context:
        raise ModelError(
            f"{name} attends to {context} tokens at most; set --window-tokens {context} or less."
        )
    return asked or min(DEFAULT_WINDOW, context)
