"""What each layer costs, as tables and as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.quantize.progressive import Descent
from qlora_kit.quantize.sensitivity.units import NO_BLOCK, block_of, kind_of
from qlora_kit.report.reporter import Reporter

if TYPE_CHECKING:
    from qlora_kit.quantize.mixed_base import Chosen, Measured
    from qlora_kit.quantize.sensitivity.measure import Entry, Sensitivity
    from qlora_kit.quantize.sensitivity.statistics import LayerStatistics

_MIB = 1024**2
_SMALLEST = 1e-9
_HOW_SIZES_COUNT = (
    "MiB: of all weights, with two bytes for each number that is not quantized, in whatever "
    "precision the reference was run"
)


def ranking(reporter: Reporter, found: Sensitivity, top: int) -> None:
    """The most sensitive units first."""
    plan, entries = found.plan, found.ranked
    how = "measured one at a time" if plan.is_exact else "estimated in one pass"
    total = sum(entry.kl for entry in entries)
    figures = ("KL", "perplexity", "same top token") if plan.is_exact or plan.check else ()
    share = "share" if plan.is_exact else "share of the estimates"
    reporter.table(
        f"What each {plan.by} costs in {plan.rounding}, {how} on {found.num_tokens:,} tokens",
        (plan.by, "parameters", *figures, "estimated KL", share),
        [_ranked_row(entry, total, len(figures)) for entry in entries[:top]],
    )
    if len(entries) > top:
        rest = sum(entry.kl for entry in entries[top:])
        reporter.say(
            f"… and {len(entries) - top} more with {rest / total if total else 0:.1%} of the KL"
        )
    measured = next((entry.cost for entry in entries if entry.cost is not None), None)
    if measured is not None:
        perplexity = measured.divergence.reference_perplexity
        reporter.say(f"reference perplexity {perplexity:.4f}")
    for what, agreement in (
        ("estimates against measurements", found.check),
        ("this ranking against that on other rows", found.stability),
    ):
        if agreement is not None:
            reporter.say(
                f"{what}: Spearman {agreement.spearman:.3f} over {agreement.num_units} {plan.by}s"
            )


def _ranked_row(entry: Entry, total: float, num_figures: int) -> tuple[str, ...]:
    """With as many figures of what was measured; a dash for each where this unit was not."""
    figures = ("–",) * num_figures
    if entry.cost is not None:
        measured = entry.cost.divergence
        figures = (
            f"{measured.kl_mean:.3g}",
            f"{measured.candidate_perplexity:.4f}",
            f"{measured.top1_agreement:.2%}",
        )
    return (
        entry.unit.name,
        f"{entry.num_parameters:,}",
        *figures,
        f"{entry.estimate:.3g}",
        f"{entry.kl / total if total else 0:.1%}",
    )


def statistics(reporter: Reporter, found: Sequence[LayerStatistics], top: int) -> None:
    """The layers whose weights are rounded worst first, and every finding."""
    ordered = sorted(found, key=lambda one: (-one.num_non_finite, -one.error))
    reporter.table(
        "Weights by layer, the worst rounded first",
        ("layer", "shape", "absmax", "kurtosis", "outlier columns", "saturated", "NaN", "error"),
        [
            (
                one.name,
                f"{one.num_out} × {one.num_in}",
                f"{one.absmax:.3g}",
                f"{one.kurtosis:.2f}",
                f"{one.num_outlier_columns}",
                f"{one.saturation:.2%}",
                f"{one.num_non_finite}",
                f"{one.error:.4f}",
            )
            for one in ordered[:top]
        ],
    )
    for one in found:
        for finding in one.findings():
            reporter.warn(finding)


def chosen(reporter: Reporter, found: Chosen | Descent) -> None:
    """The widths that a budget allows."""
    if isinstance(found, Descent):
        _descent(reporter, found)
    else:
        _mixture(reporter, found)


def _descent(reporter: Reporter, found: Descent) -> None:
    tokens = found.kept.divergence.num_tokens
    reporter.table(
        f"From 16 bits down to a KL of {found.max_kl:g}, on {tokens:,} other tokens",
        ("layers", "MiB", "KL", "perplexity", "same top token", ""),
        [
            (
                stage.name,
                f"{stage.mixture.num_bytes / _MIB:,.1f}",
                f"{stage.divergence.kl_mean:.4g}",
                f"{stage.divergence.candidate_perplexity:.4f}",
                f"{stage.divergence.top1_agreement:.2%}",
                "over budget" if not stage.holds else "← kept" if stage is found.kept else "",
            )
            for stage in found.stages
        ],
    )
    reporter.say(_HOW_SIZES_COUNT)


def _mixture(reporter: Reporter, chosen: Chosen) -> None:
    """The mixture beside uniform ways."""
    mixture = chosen.mixture
    if not mixture.is_quantized:
        reporter.say(
            f"The whole model stays in 16 bits within this budget ({mixture.num_bytes / _MIB:,.1f} "
            "MiB): nothing needs to be quantized."
        )
    what = f"The mixture ({mixture.name})" if mixture.is_quantized else "16 bits"
    tokens = chosen.measured.divergence.num_tokens
    reporter.table(
        f"{what} and uniform ways, on {tokens:,} other tokens",
        ("base", "MiB", "KL", "perplexity", "same top token"),
        [_measured_row(one) for one in (chosen.measured, *chosen.others)],
    )
    reporter.say(_HOW_SIZES_COUNT)
    reporter.say(f"expected KL {mixture.expected_kl:.3g}, the layers' own added up")


def _measured_row(one: Measured) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.num_bytes / _MIB:,.1f}",
        f"{one.divergence.kl_mean:.4g}",
        f"{one.divergence.candidate_perplexity:.4f}",
        f"{one.divergence.top1_agreement:.2%}",
    )


def heat_map(found: Sensitivity, path: Path) -> None:
    """Block × kind of module, coloured by KL on a logarithmic scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows, columns, cells = _grid(found)
    values = [value for row in cells for value in row if not math.isnan(value)]
    low, high = max(min(values), _SMALLEST), max(max(values), _SMALLEST * 10)
    figure = Figure(
        figsize=(max(5.0, 0.95 * len(columns) + 2.5), max(2.5, 0.26 * len(rows) + 2.2)),
        layout="constrained",
    )
    axes = figure.subplots()
    picture = axes.imshow(
        cells, aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, low * 2))
    )
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_ylabel("block")
    how = "measured" if found.plan.is_exact else "estimated"
    axes.set_title(
        f"KL (nats per token, {how}) of quantizing\none {found.plan.by} to {found.plan.rounding}",
        fontsize=9,
    )
    figure.colorbar(picture, ax=axes, label="KL, logarithmic")
    figure.savefig(path, dpi=150)


def _grid(found: Sensitivity) -> tuple[list[str], list[str], list[list[float]]]:
    """Rows are blocks, columns kinds; a unit of several modules is shown in one cell."""
    by = found.plan.by
    cells: dict[tuple[str, str], float] = {}
    for entry in found.entries:
        module = entry.unit.modules[0]
        row = "all" if by == "kind" else block_of(module).rpartition(".")[2]
        column = "all modules" if by == "block" else kind_of(module)
        cells[row, column] = max(entry.kl, _SMALLEST)
    rows = list(dict.fromkeys(row for row, _ in cells))
    columns = list(dict.fromkeys(column for _, column in cells))
    if NO_BLOCK in rows:
        rows.append(rows.pop(rows.index(NO_BLOCK)))
    return rows, columns, [[cells.get((r, c), math.nan) for c in columns] for r in rows]
