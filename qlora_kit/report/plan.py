"""A plan as a table, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.report.reporter import Reporter

if TYPE_CHECKING:
    from qlora_kit.plan.plan import Plan
    from qlora_kit.plan.suggest import Suggestion

_MIB, _GIB = 2**20, 2**30


def plan(reporter: Reporter, found: Plan, is_of_rows: bool) -> None:
    """What is needed at the worst point of each phase, and whether it fits."""
    machine, worst, way = found.hardware, found.worst, found.choice.way
    count = f"{machine.num_devices} × " * (machine.num_devices > 1)
    reporter.say(
        f"machine   {count}{machine.device_name}, {found.budget_bytes / _GIB:.1f} GiB"
        + " each" * (machine.num_devices > 1)
        + f"; computes in {found.compute_dtype}, trains in {found.precision}"
    )
    whose = "the longest of the rows" if is_of_rows else "rows of data.max_length, all supervised"
    reporter.say(
        f"batch     {len(worst.items)} sequence{'s' * (len(worst.items) > 1)}, "
        f"{worst.num_tokens:,} tokens ({whose}), {sum(worst.supervised):,} supervised; "
        f"{worst.description}"
    )
    reporter.say(
        f"chooses   {way.at_a_time} of {len(worst.items)} at a time, "
        f"{way.num_recomputing} of {found.num_layers} layers recomputing"
        + ", activations waiting in the host's memory" * way.offloads
        + f", {found.choice.stays.told()}" * bool(found.choice.stays.num_bytes)
        + f"; within train.memory_budget: {found.memory_budget}" * (found.memory_budget != "auto")
    )
    _say_how_fast(reporter, found)
    told = (name for one in found.moments for name, size in one.components.items() if size)
    names = list(dict.fromkeys(told))
    rows = [(name, *(_mib(one.components.get(name, 0)) for one in found.moments)) for name in names]
    rows.append(("all together", *(_mib(one.num_bytes) for one in found.moments)))
    reporter.table("MiB at the worst point of", ("", *(one.name for one in found.moments)), rows)
    if machine.num_devices > 1:
        reporter.say(
            "Each GPU holds all of it (DDP). What FSDP2 or DeepSpeed would share out is not "
            "foretold: there all layers recompute and no shortcut is taken, so that activations "
            "need more and weights less."
        )
    peak = found.peak
    if found.fits:
        reporter.say(
            f"It fits: {peak.num_bytes / _GIB:.2f} of {found.budget_bytes / _GIB:.2f} GiB, most in "
            f"{peak.name}."
        )
    else:
        reporter.say(
            f"It does not fit: {peak.num_bytes / _GIB:.2f} GiB in {peak.name}, and there are "
            f"{found.budget_bytes / _GIB:.2f} GiB."
        )


def _say_how_fast(reporter: Reporter, found: Plan) -> None:
    rate = found.tokens_per_second
    if rate is None:
        reporter.say(
            f"speed     not known: no calibration of {found.hardware.device_name} is here; "
            "plan RECIPE --calibrate makes one on the machine itself"
        )
        return
    hours = "" if found.seconds is None else f", {found.seconds / 3600:,.2f} hours of training"
    reporter.say(f"speed     {rate:,.0f} tokens a second{hours}")


def suggestions(reporter: Reporter, found: Sequence[Suggestion]) -> None:
    """What to change, with what each saves."""
    if not found:
        reporter.say("Nothing that this recipe could change would save any.")
        return
    reporter.table(
        "what to change",
        ("", "saves MiB", "then GiB", "fits", "that is"),
        [
            (
                " ".join(one.overrides),
                _mib(one.saved_bytes),
                f"{one.peak_bytes / _GIB:.2f}",
                "yes" if one.fits else "no",
                one.why,
            )
            for one in found
        ],
    )
    if not any(one.fits for one in found):
        smallest = min(found, key=lambda one: one.peak_bytes)
        reporter.say(
            f"The smallest budget that would do is {smallest.peak_bytes / _GIB:.2f} GiB, with "
            f"{' '.join(smallest.overrides)}."
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f}" if num_bytes else "–"
