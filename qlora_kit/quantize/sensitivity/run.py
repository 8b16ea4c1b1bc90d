"""From what a user asks to a measurement, and the mixture that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.atomic import draft_beside
from qlora_kit.environment import probe_hardware, resolve_compute_dtype
from qlora_kit.errors import ModelError, RunError
from qlora_kit.model.base import Base, load_base, refuse_unquantizable
from qlora_kit.model.prequantized import stored_quantization
from qlora_kit.quantize.mixed_base import Chosen, choose_mixture, require_loadable, uniform_base
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

if TYPE_CHECKING:
    from qlora_kit.data.sequences import TokenSequence


@dataclass(frozen=True)
class Request:
    """What a user asks of `sensitivity`."""

    data: str
    rounding: Rounding
    by: By = "layer"
    is_exact: bool = True
    check: int = 0
    num_tokens: int = 1024
    window_tokens: int = 256
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
        _require_writable(request.out)
    if request.chooses:
        require_loadable(request.rounding)
    require_rows(request.data, "train")
    base = load_reference(spec, reporter)
    if request.chooses:
        refuse_unquantizable(base.skeleton, uniform_base(request.rounding))
    _tell_of_experts(base, reporter)
    first, other = read_sets(base, request, 2 if request.stability or request.chooses else 1)
    plan = Plan(request.rounding, request.by, request.is_exact, request.check, request.seed)
    others = other if request.stability else None
    found = measure_sensitivity(base, first, plan, others, reporter)
    if not request.chooses:
        return found, None
    assert other is not None
    with reference_of(base, other, reporter) as reference:
        return found, _choose(base, found, reference, request, reporter)


def _require_writable(out: Path) -> None:
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
    """A model in the precision that everything is measured against.

    Raises:
        ModelError: it is stored quantized, so there is no such precision of it.
    """
    if stored_quantization(spec) is not None:
        raise ModelError(
            f"{spec.name_or_path} is stored quantized, so there is nothing to compare with; take "
            "the model in 16 bits."
        )
    hardware = probe_hardware()
    dtype, why = resolve_compute_dtype("auto", hardware)
    quantization = QuantizationSpec(load_in_4bit=False)
    base = load_base(spec, quantization, getattr(torch, dtype), why, hardware)
    reporter.say(f"reference {base.source.name} in {dtype} ({why})")
    return base


def read_sets(
    base: Base, request: Request, num_sets: int
) -> tuple[list[TokenSequence], list[TokenSequence] | None]:
    """Disjoint rows: to rank on, and where asked to measure on."""
    context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and request.window_tokens > context:
        raise ModelError(
            f"{base.source.name} attends to {context} tokens at most; set --window-tokens "
            f"{context} or less."
        )
    rows = read_rows(request.data, base.tokenizer)
    sets = deal(rows, num_sets, request.num_tokens, request.window_tokens, request.seed)
    return sets[0], sets[1] if num_sets > 1 else None
