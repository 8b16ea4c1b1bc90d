"""What the runs came to: the table, the ratios against the kit, and whether they compare at all."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_bench.sides import SIDES
from train_bench.watch import Outcome
from train_bench.work import Work

TOLERANCE = 1e-4
"""Of each update's loss, relative to plain transformers + peft in float32."""


def told(
    rounds: list[list[Outcome]], work: Work, recipe: dict[str, Any], arguments: argparse.Namespace
) -> int:
    """Print and keep the figures. Returns the exit code."""
    by_side = {side: [one for row in rounds for one in row if one.side == side] for side in SIDES}
    by_side = {side: found for side, found in by_side.items() if found}
    operations = needed_operations(work)
    figures = {side: figures_of(found, work, operations) for side, found in by_side.items()}
    show(figures, work, arguments)
    ratios = against_kit(rounds)
    for side, of in ratios.items():
        print(f"kit : {side}  " + ", ".join(f"{name} {value}" for name, value in of.items()))
    worst = worst_difference(by_side)
    limit = TOLERANCE if work.precision == "fp32" else 2e-2
    print(f"largest relative difference of an update's loss: {worst:.2g} (at most {limit:g})")
    if arguments.json:
        kept = {"figures": figures, "ratios": ratios, "loss_difference": worst, "recipe": recipe}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.plot:
        draw(figures, arguments.plot)
    if worst > limit:
        print("The losses differ, so this is no comparison.", file=sys.stderr)
        return 1
    return 0


def figures_of(found: list[Outcome], work: Work, operations: float) -> dict[str, Any]:
    """Medians over the runs of one side, and the runs."""
    seconds = statistics.median(one.seconds for one in found)
    rate = statistics.median(one.gauge_before for one in found)
    gauges = [gauge for one in found for gauge in (one.gauge_before, one.gauge_after)]
    return {
        "supervised_per_second": sum(work.supervised_tokens[1:]) / seconds,
        "real_per_second": sum(work.real_tokens[1:]) / seconds,
        "peak_bytes": statistics.median(one.peak_bytes for one in found),
        "first_update_seconds": statistics.median(one.ends[0] for one in found),
        "first_update_cpu_seconds": statistics.median(one.first_cpu_seconds for one in found),
        "share_of_limit": operations / (rate * 1e9) / seconds,
        "gauge": rate,
        "gauge_drift": max(gauges) / min(gauges),
        "runs": [asdict(one) for one in found],
    }


def show(figures: dict[str, dict[str, Any]], work: Work, arguments: argparse.Namespace) -> None:
    """What was run, and a line of each side."""
    supervised, real = sum(work.supervised_tokens[1:]), sum(work.real_tokens[1:])
    print(
        f"{len(work.updates)} updates of {arguments.batch * arguments.accumulation} rows, "
        f"{real / (len(work.updates) - 1):,.0f} real and "
        f"{supervised / (len(work.updates) - 1):,.0f} supervised tokens each; recompute "
        f"{arguments.recompute}, {arguments.precision}, {arguments.threads} thread(s), "
        f"{arguments.rounds} rounds"
    )
    print(
        "side    supervised/s     real/s   peak MiB   first update s (CPU)   share of limit   gauge"
    )
    for side, now in figures.items():
        print(
            f"{side:7} {now['supervised_per_second']:12.1f} {now['real_per_second']:10.1f} "
            f"{now['peak_bytes'] / 2**20:10,.0f} {now['first_update_seconds']:16.1f} "
            f"({now['first_update_cpu_seconds']:4.1f})"
            f"{now['share_of_limit']:16.2f} {now['gauge']:7.1f} (× {now['gauge_drift']:.2f})"
        )


def needed_operations(work: Work) -> float:
    """Of all updates but the first: forward, and the gradients of the inputs, of every linear layer
    over real tokens, and of the head over supervised ones.
    """
    from transformers import AutoConfig

    from qlora_kit.model.skeleton import build_skeleton

    skeleton = build_skeleton(AutoConfig.from_pretrained(work.model), False)
    head = skeleton.model.get_output_embeddings().weight
    layers = sum(
        skeleton.model.get_submodule(name).weight.numel()
        for name in skeleton.linear_modules
        if not name.endswith("lm_head")
    )
    real, supervised = sum(work.real_tokens[1:]), sum(work.supervised_tokens[1:])
    return 4.0 * (real * layers + supervised * head.numel())


def against_kit(rounds: list[list[Outcome]]) -> dict[str, dict[str, str]]:
    """Median (lowest-highest) over the rounds: how often as fast, and the share of memory and of
    the time to the first update.
    """
    ratios: dict[str, dict[str, str]] = {}
    for side in SIDES:
        if side == "kit":
            continue
        pairs = []
        for row in rounds:
            known = {one.side: one for one in row}
            if "kit" in known and side in known:
                pairs.append((known["kit"], known[side]))
        if pairs:
            ratios[side] = {
                "speed": spread([other.seconds / kit.seconds for kit, other in pairs]),
                "peak": spread([kit.peak_bytes / other.peak_bytes for kit, other in pairs]),
                "first update": spread([kit.ends[0] / other.ends[0] for kit, other in pairs]),
                "in CPU seconds": spread(
                    [kit.first_cpu_seconds / other.first_cpu_seconds for kit, other in pairs]
                ),
            }
    return ratios


def spread(values: list[float]) -> str:
    """Median, with the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def worst_difference(by_side: dict[str, list[Outcome]]) -> float:
    """Of any update's loss from that of the first run of `plain`, relative to it."""
    reference = by_side.get("plain", next(iter(by_side.values())))[0].losses
    return max(
        abs(loss - wanted) / max(abs(wanted), 1e-12)
        for found in by_side.values()
        for one in found
        for loss, wanted in zip(one.losses, reference, strict=True)
    )


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for side, now in figures.items():
        axis.scatter(now["peak_bytes"] / 2**20, now["supervised_per_second"])
        axis.annotate(side, (now["peak_bytes"] / 2**20, now["supervised_per_second"]))
    axis.set_xlabel("peak memory, MiB")
    axis.set_ylabel("supervised tokens per second")
    figure.savefig(path)
