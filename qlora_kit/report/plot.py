"""Size and speed against quality, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.report.comparison import short_names
from qlora_kit.report.labels import place_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_kit.evaluate.compare import Comparison
    from qlora_kit.evaluate.one import Measurement

SUFFIXES = (".png", ".svg", ".pdf")

_MIB = 2**20
# Three that people with any colour vision tell apart (Okabe and Ito 2008).
_COLOURS = {"transformers": "#0072B2", "llama.cpp": "#D55E00", "onnxruntime": "#009E73"}
_GREY = "#6B6B6B"
_LOG_FROM = 8.0


def plot(found: Comparison, path: Path) -> None:
    """Perplexity against size on disk, and against decoding speed where it was measured.

    The first model, which the others are compared with, is a ring with a line through it; the
    others say their KL from it.
    """
    from matplotlib.figure import Figure

    names = short_names([one.name for one in found.measured])
    timed = any(_decode(one) for one in found.measured)
    figure = Figure(figsize=(11 if timed else 6.5, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    sizes = [one.cost.footprint.disk_bytes / _MIB for one in found.measured]
    labels = [_panel(axes[0], names, found.measured, sizes)]
    axes[0].set_xlabel("size on disk, MiB   (← smaller)")
    axes[0].set_ylabel("perplexity on held-out text   (↓ better)")
    if timed:
        speeds = [_decode(one) for one in found.measured]
        labels.append(_panel(axes[1], names, found.measured, speeds))
        axes[1].set_xlabel("new tokens per second, one sequence   (faster →)")
    _legend(figure, found.measured)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, texts in zip(axes, labels, strict=True):
        place_labels(axis, texts)
    draft = path.with_name(f".{path.name}.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(draft, dpi=150, format=path.suffix[1:])
    os.replace(draft, path)


def _panel(
    axis: Any, names: Sequence[str], measured: Sequence[Measurement], across: Sequence[float | None]
) -> list[tuple[float, float, str]]:
    """Draw the points; their labels come when the layout stands."""
    points = [
        (x, one.evaluation.perplexity.perplexity, name, one)
        for x, name, one in zip(across, names, measured, strict=True)
        if x is not None and one.evaluation.perplexity is not None
    ]
    labels = []
    for x, y, name, one in points:
        is_first = one is measured[0]
        colour = _COLOURS[one.cost.runtime]
        axis.scatter(
            [x],
            [y],
            s=70,
            color="white" if is_first else colour,
            edgecolors=colour,
            linewidths=2,
            zorder=4 if is_first else 3,
        )
        if is_first:
            axis.axhline(y, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        label = name if one.divergence is None else f"{name}\nKL {one.divergence.kl_mean:.2g}"
        labels.append((x, y, label))
    heights = [y for _, y, _, _ in points]
    if heights and max(heights) > _LOG_FROM * min(heights):
        axis.set_yscale("log")
    axis.margins(x=0.22, y=0.18)
    axis.set_xlim(left=max(axis.get_xlim()[0], 0))
    axis.grid(color="#E6E6E6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return labels


def _legend(figure: Any, measured: Sequence[Measurement]) -> None:
    """Of the runtimes, where there are several; and of what the ring means."""
    from matplotlib.lines import Line2D

    used = [name for name in _COLOURS if any(one.cost.runtime == name for one in measured)]
    marks = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS[name], label=name)
        for name in used
        if len(used) > 1
    ]
    marks.append(
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=_GREY,
            markerfacecolor="white",
            markeredgewidth=2,
            label="the one that the others are compared with",
        )
    )
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)


def _decode(one: Measurement) -> float | None:
    return one.cost.speed.decode.median if one.cost.speed and one.cost.speed.decode else None
