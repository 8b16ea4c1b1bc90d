"""What the runs came to: the table, the ratios against the kit, and which sides compare at all."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train_bench.registry import SIDES
from train_bench.watch import Failure, Outcome
from train_bench.work import Work

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of each update's loss, relative to plain transformers + peft, by precision."""
UNDISTURBED = 0.85
"""Share of the best gauge from which on times can be compared."""
TRUSTED = 0.1
"""Variation of the gauge up to which a call's figures need no warning."""


@dataclass(frozen=True)
class Apart:
    """The largest relative difference of an update's loss from the reference's."""

    relative: float
    update: int
    """The update where it is, counted from 1; 0 where the losses are not the same number."""

    def __str__(self) -> str:
        if self.update == 0:
            return "inf (another number of losses)"
        return f"{self.relative:.2g}" + (f" (update {self.update})" if self.relative else "")


def told(
    rounds: list[list[Outcome]],
    failures: list[Failure],
    work: Work,
    recipe: dict[str, Any],
    arguments: argparse.Namespace,
) -> int:
    """Print and keep the figures. Returns the exit code: 1 where a side failed, or did not do the
    same.
    """
    rounds = without(rounds, failures)
    by_label: dict[str, list[Outcome]] = {}
    for one in sorted((one for row in rounds for one in row), key=lambda one: order(one.label)):
        by_label.setdefault(one.label, []).append(one)
    if not by_label:
        return told_failures(failures)
    operations = needed_operations(work)
    figures = {label: figures_of(found, work, operations) for label, found in by_label.items()}
    show(figures, work, arguments)
    differences = loss_differences(by_label)
    limit = TOLERANCE[work.precision]
    void = {label for label, apart in differences.items() if not apart.relative <= limit}
    ratios = against_kit(rounds, void)
    for label, of in ratios.items():
        print(f"kit : {label}  " + ", ".join(f"{name} {value}" for name, value in of.items()))
    varied = variation(figures)
    if arguments.json:
        kept = {
            "figures": figures,
            "ratios": ratios,
            "loss_differences": {label: asdict(apart) for label, apart in differences.items()},
            "failures": [asdict(one) for one in failures],
            "gauge_variation": varied,
            "recipe": recipe,
        }
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    if arguments.plot:
        draw(figures, arguments.plot)
    code = max(judged(differences, void, limit), told_failures(failures))
    show_trust(varied)
    return code


def without(rounds: list[list[Outcome]], failures: list[Failure]) -> list[list[Outcome]]:
    """The rounds, less the lines that failed in any of them."""
    failed = {one.label for one in failures}
    return [[one for one in row if one.label not in failed] for row in rounds]


def told_failures(failures: list[Failure]) -> int:
    """Name once more what failed. Returns the exit code for it."""
    for one in failures:
        print(f"{one.label}: {one.why} It is not compared.", file=sys.stderr)
    return 1 if failures else 0


def judged(differences: dict[str, Apart], void: set[str], limit: float) -> int:
    """Say how far the losses are apart, and which sides are therefore not compared."""
    apart = ", ".join(f"{label} {difference}" for label, difference in differences.items())
    print(
        f"largest relative difference of an update's loss from {reference(differences)}'s "
        f"(at most {limit:g}): {apart}"
    )
    for label in sorted(void, key=order):
        print(
            f"{label}: its losses differ by up to {differences[label]}, so it is not compared.",
            file=sys.stderr,
        )
    return 1 if void else 0


def variation(figures: dict[str, dict[str, Any]]) -> float:
    """By how much the fastest gauge of all runs is above the slowest, as a share of it."""
    gauges = [
        run[name]
        for now in figures.values()
        for run in now["runs"]
        for name in ("gauge_before", "gauge_after")
    ]
    return float(max(gauges) / min(gauges) - 1)


def show_trust(varied: float) -> None:
    """Say how steady the machine was while all this was measured."""
    print(f"trust: the gauge varied by {varied:.0%} between the runs")
    if varied > TRUSTED:
        print(
            f"More than {TRUSTED:.0%}: neighbours were at work. Measure again when they are not; "
            "until then the ratios by CPU seconds tell more than those by time, and neither much.",
            file=sys.stderr,
        )


def order(label: str) -> int:
    """Place of a line in the table: that of its side."""
    return list(SIDES).index(label.split()[0])


def figures_of(found: list[Outcome], work: Work, operations: float) -> dict[str, Any]:
    """Medians over the runs of one line, and the runs."""
    seconds = statistics.median(one.seconds for one in found)
    cpu_seconds = statistics.median(one.cpu_seconds for one in found)
    rate = statistics.median(one.gauge_before for one in found)
    gauges = [gauge for one in found for gauge in (one.gauge_before, one.gauge_after)]
    return {
        "supervised_per_second": sum(work.supervised_tokens[1:]) / seconds,
        "real_per_second": sum(work.real_tokens[1:]) / seconds,
        "real_per_cpu_second": sum(work.real_tokens[1:]) / cpu_seconds,
        "peak_bytes": statistics.median(one.peak_bytes for one in found),
        "device_peaks": {
            name: statistics.median(one.device_peaks[name] for one in found)
            for name in found[0].device_peaks
        },
        "first_update_seconds": statistics.median(one.ends[0] for one in found),
        "first_update_cpu_seconds": statistics.median(one.cpu_ends[0] for one in found),
        "share_of_limit": operations / (rate * 1e9) / seconds,
        "recomputes": found[0].recomputes,
        "versions": found[0].versions,
        "gauge": rate,
        "gauge_drift": max(gauges) / min(gauges),
        "runs": [asdict(one) for one in found],
    }


def show(figures: dict[str, dict[str, Any]], work: Work, arguments: argparse.Namespace) -> None:
    """What was run, a line of each side, and the versions that each has."""
    supervised, real = sum(work.supervised_tokens[1:]), sum(work.real_tokens[1:])
    print(
        f"{len(work.updates)} updates of {arguments.accumulation} × {arguments.batch} rows, "
        f"{real / (len(work.updates) - 1):,.0f} real and "
        f"{supervised / (len(work.updates) - 1):,.0f} supervised tokens each; recompute "
        f"{arguments.recompute}, {arguments.precision}, {arguments.device}, "
        f"{arguments.threads} thread(s), "
        f"{arguments.rounds} rounds; {work.optimizer} at {work.learning_rate:g}"
    )
    on_device = [f"{name} MiB" for name in next(iter(figures.values()))["device_peaks"]]
    print(
        "side          recomputes   supervised/s     real/s   real/CPU s   peak MiB   "
        "first update s (CPU)   share of limit   gauge" + "".join(f"{one:>15}" for one in on_device)
    )
    for label, now in figures.items():
        print(
            f"{label:13} {now['recomputes']:10} {now['supervised_per_second']:14.1f} "
            f"{now['real_per_second']:10.1f} {now['real_per_cpu_second']:12.1f} "
            f"{now['peak_bytes'] / 2**20:10,.0f} {now['first_update_seconds']:15.1f} "
            f"({now['first_update_cpu_seconds']:4.1f})"
            f"{now['share_of_limit']:17.2f} {now['gauge']:7.1f} (× {now['gauge_drift']:.2f})"
            + "".join(f"{one / 2**20:15,.0f}" for one in now["device_peaks"].values())
        )
    for label, share in disturbed(figures).items():
        print(f"{label}: ran at {share:.2f} of the best gauge, so only its CPU seconds tell much")
    for label, now in figures.items():
        print(f"{label}: " + ", ".join(f"{name} {one}" for name, one in now["versions"].items()))


def disturbed(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Share of the best gauge, for lines whose runs neighbours slowed much."""
    best = max(now["gauge"] for now in figures.values())
    shares = {label: now["gauge"] / best for label, now in figures.items()}
    return {label: share for label, share in shares.items() if share < UNDISTURBED}


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


def against_kit(rounds: list[list[Outcome]], void: set[str]) -> dict[str, dict[str, str]]:
    """Median (lowest-highest) over the rounds: how often as fast, and the share of memory and of
    the time to the first update. None for sides that did not do the same.
    """
    pairs: dict[str, list[tuple[Outcome, Outcome]]] = {}
    for row in rounds:
        known = {one.label: one for one in row}
        for label in sorted(known.keys() - void - {"kit"}, key=order):
            if "kit" in known.keys() - void:
                pairs.setdefault(label, []).append((known["kit"], known[label]))
    return {label: ratios_of(found) for label, found in pairs.items()}


def ratios_of(pairs: list[tuple[Outcome, Outcome]]) -> dict[str, str]:
    """Of the kit's runs and another side's, round by round."""
    on_device = {
        f"{name} on the GPU": spread(
            [kit.device_peaks[name] / other.device_peaks[name] for kit, other in pairs]
        )
        for name in pairs[0][0].device_peaks
    }
    return {
        "speed": spread([other.seconds / kit.seconds for kit, other in pairs]),
        "speed by CPU seconds": spread(
            [other.cpu_seconds / kit.cpu_seconds for kit, other in pairs]
        ),
        "peak": spread([kit.peak_bytes / other.peak_bytes for kit, other in pairs]),
        "first update": spread([kit.ends[0] / other.ends[0] for kit, other in pairs]),
        "in CPU seconds": spread([kit.cpu_ends[0] / other.cpu_ends[0] for kit, other in pairs]),
        **on_device,
    }


def spread(values: list[float]) -> str:
    """Median, with the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def reference(labels: Collection[str]) -> str:
    """Whose losses the others' are held against: plain transformers + peft where it has run."""
    return next((label for label in labels if label.startswith("plain")), next(iter(labels)))


def loss_differences(by_label: dict[str, list[Outcome]]) -> dict[str, Apart]:
    """Of any update's loss from that of the reference's first run, by label."""
    wanted = by_label[reference(by_label)][0].losses
    return {
        label: max((difference(one.losses, wanted) for one in found), key=lambda one: one.relative)
        for label, found in by_label.items()
    }


def difference(losses: list[float], wanted: list[float]) -> Apart:
    """The largest one of two runs' losses; infinite where a side tells another number of them, or
    one that is not a number.
    """
    if len(losses) != len(wanted):
        return Apart(math.inf, 0)
    apart = [
        abs(loss - one) / max(abs(one), 1e-12) for loss, one in zip(losses, wanted, strict=True)
    ]
    apart = [one if math.isfinite(one) else math.inf for one in apart]
    largest = max(apart)
    return Apart(largest, apart.index(largest) + 1)


def any_on_device(figures: dict[str, dict[str, Any]]) -> bool:
    return any(now["device_peaks"] for now in figures.values())


def draw(figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Speed against memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for side, now in figures.items():
        peak = now["device_peaks"].get("allocated", now["peak_bytes"]) / 2**20
        axis.scatter(peak, now["supervised_per_second"])
        axis.annotate(side, (peak, now["supervised_per_second"]))
    axis.set_xlabel("peak memory, MiB" + (" of the GPU" * any_on_device(figures)))
    axis.set_ylabel("supervised tokens per second")
    figure.savefig(path)
