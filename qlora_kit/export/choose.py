"""Which of several merges to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora_kit.evaluate.divergence import Divergence
from qlora_kit.export.merge import MergeResult
from qlora_kit.report.reporter import Reporter


@dataclass(frozen=True)
class Candidate:
    """One merge, measured against the graph that was trained."""

    result: MergeResult
    divergence: Divergence
    faults: tuple[str, ...]
    """What does not come back when its folder is loaded."""
    max_kl: float | None
    """None where it need not be what was trained: training has quantized it."""

    @property
    def passed(self) -> bool:
        is_near = self.max_kl is None or self.divergence.kl_mean <= self.max_kl
        return is_near and not self.faults

    def as_dict(self) -> dict[str, Any]:
        survival = self.result.survival
        return {
            "base": self.result.base,
            "dtype": self.result.dtype,
            "passed": self.passed,
            "reload_faults": list(self.faults),
            "divergence": asdict(self.divergence),
            "survival": None if survival is None else asdict(survival),
            "num_modules": self.result.num_modules,
            "num_bytes": self.result.num_bytes,
            "seconds": round(self.result.seconds, 2),
        }


def choose_base(candidates: Sequence[Candidate]) -> Candidate:
    """Of those within the budget the one with the lowest held-out loss; else the nearest."""
    within = [one for one in candidates if one.passed]
    if within:
        return min(within, key=lambda one: one.divergence.candidate_loss)
    return min(candidates, key=lambda one: one.divergence.kl_mean)


def better_beyond_budget(candidates: Sequence[Candidate], chosen: Candidate) -> Candidate | None:
    """The sound candidate with a lower held-out loss that the budget alone kept from being it."""
    best = min(candidates, key=lambda one: one.divergence.candidate_loss)
    return best if best is not chosen and not best.faults else None


def why_beyond_budget(chosen: Candidate, num_8bit: int, trained_in: str = "float32") -> list[str]:
    """What of its distance is no loss: of a base with `num_8bit` layers in 8 bits, or one that was
    trained in this dtype.
    """
    if chosen.passed or chosen.faults or chosen.result.base != "dequantized":
        return []
    if not num_8bit and trained_in != "float32":
        return [
            f"what was trained computes in {trained_in}, and what that rounds counts as distance "
            "from it, the more the less sure the model is, beside what it costs to round the sum "
            f"to {chosen.result.dtype}. A budget that allows for it: --max-kl "
            f"{_above(chosen.divergence.kl_mean)}, in a recipe export.merge_options.max_kl; "
            "train.precision: fp32 needs none."
        ]
    if not num_8bit:
        return []
    layers = "1 layer" if num_8bit == 1 else f"{num_8bit} layers"
    return [
        f"{layers} of the base {'is' if num_8bit == 1 else 'are'} kept in 8 bits, where LLM.int8() "
        "rounds what goes into a layer as well as its weight. Merged weights are computed with "
        "unrounded inputs, and that difference counts as distance from what was trained. A budget "
        f"that allows for it: --max-kl {_above(chosen.divergence.kl_mean)}, in a recipe "
        "export.merge_options.max_kl."
    ]


def measured_rows(num_rows: int, max_rows: int) -> str:
    """Which of the held-out rows a merge is measured on, where not all of them may be."""
    rows = "row" if num_rows == 1 else "rows"
    if num_rows < max_rows:
        return f"{num_rows:,} held-out {rows}"
    return f"the first {num_rows:,} held-out {rows}"


def show_candidates(
    candidates: Sequence[Candidate],
    chosen: Candidate,
    max_kl: float | None,
    reporter: Reporter,
    *,
    measured_on: str = "held-out rows",
) -> None:
    """Figures of every candidate, the trained graph first; `measured_on` names the rows."""
    reference = candidates[0].divergence
    rows = [
        ["as trained", f"{reference.reference_perplexity:.4g}", "", "", "", ""],
        *(_row(one, one is chosen) for one in candidates),
    ]
    budget = "before it is quantized" if max_kl is None else f"budget: KL {max_kl:g}"
    reporter.table(
        f"Merge, on {reference.num_tokens:,} tokens of {measured_on} ({budget})",
        ["model", "perplexity", "KL", "same top token", "max |Δ log p|", "ΔW kept"],
        rows,
    )
    better = better_beyond_budget(candidates, chosen)
    if better is not None:
        base, measured = better.result.base, better.divergence
        reporter.say(
            f"The {base} base predicts the held-out rows better (perplexity "
            f"{measured.candidate_perplexity:.4g}, the kept one "
            f"{chosen.divergence.candidate_perplexity:.4g}), but is further from what was trained "
            f"than the budget. To keep that one: --base {base} --max-kl "
            f"{_above(measured.kl_mean)}, into another folder with --out"
        )


def _above(value: float) -> str:
    """A round number just above `value`."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step + 1e-9) * step:.2g}"


def _row(candidate: Candidate, is_chosen: bool) -> list[str]:
    divergence, survival = candidate.divergence, candidate.result.survival
    return [
        f"{candidate.result.base} base, {candidate.result.dtype}{' ← kept' if is_chosen else ''}",
        f"{divergence.candidate_perplexity:.4g}",
        f"{divergence.kl_mean:.2g}{'' if candidate.passed else ' over budget'}",
        f"{divergence.top1_agreement:.2%}",
        f"{divergence.max_abs_delta_logp:.2g}",
        "" if survival is None else f"{survival.median:.1%} (min {survival.min:.1%})",
    ]
