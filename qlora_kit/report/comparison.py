"""Several models side by side, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.report.narrate import METRICS
from qlora_kit.report.reporter import Reporter

if TYPE_CHECKING:
    from qlora_kit.evaluate.compare import Comparison
    from qlora_kit.evaluate.cost import Cost
    from qlora_kit.evaluate.one import Measurement
    from qlora_kit.evaluate.speed import Spread

_MIB = 2**20
_NONE = "–"
_NUM_SAMPLES = 3
_TAKES = (
    "model",
    "parameters",
    "kept as",
    "disk MiB",
    "weights MiB",
    "peak MiB",
    "load s",
    "prefill tokens/s",
    "decode tokens/s",
)
_IS_WORTH = (
    "model",
    "perplexity",
    "KL nats/token",
    "same top token",
    "max |Δ log p|",
    "exact match",
)


def comparison(reporter: Reporter, found: Comparison) -> None:
    """What each takes, what each is worth, and what each says."""
    names = short_names([one.name for one in found.measured])
    reporter.table(
        "What each takes, alone in a process",
        _TAKES,
        [_takes(name, one.cost) for name, one in zip(names, found.measured, strict=True)],
    )
    reporter.say("")
    shown = [
        name for name in METRICS if any(name in one.evaluation.metrics for one in found.measured)
    ]
    tokens = [one.divergence.num_tokens for one in found.measured if one.divergence]
    where = f"; KL from {names[0]} over {tokens[0]:,} tokens" if tokens else ""
    reporter.table(
        f"What each is worth, on held-out rows{where}",
        (*_IS_WORTH, *(name.replace("_", " ") for name in shown)),
        [_is_worth(name, one, shown) for name, one in zip(names, found.measured, strict=True)],
    )
    for name, one in zip(names, found.measured, strict=True):
        if one.refused:
            reporter.warn(f"{name}: no KL, as {one.refused}.")
        for note in one.notes:
            reporter.warn(f"{name}: {note}.")
    for failure in found.failures:
        reporter.warn(f"{failure.name} could not be measured: {failure.reason}")
    _samples(reporter, names, found.measured)


def short_names(names: Sequence[str]) -> list[str]:
    """As little of each path, from its end, as tells them apart."""
    parts = [Path(name).parts for name in names]
    length = 1
    while length < max(map(len, parts)):
        tails = ["/".join(one[-length:]) for one in parts]
        if len(set(tails)) == len(set(names)):
            break
        length += 1
    return ["/".join(one[-length:]) for one in parts]


def takes(reporter: Reporter, name: str, one: Cost) -> None:
    """What a single model takes."""
    reporter.table("What it takes", _TAKES, [_takes(short_names([name])[0], one)])
    for note in one.notes:
        reporter.warn(f"{note}.")


def _takes(name: str, one: Cost) -> tuple[str, ...]:
    taken = one.footprint
    peak = one.peak_bytes if one.peak_device_bytes is None else one.peak_device_bytes
    decode = one.speed.decode if one.speed else None
    return (
        name,
        f"{taken.num_parameters / 1e6:,.1f} M",
        ", ".join(forms(one)),
        _mib(taken.disk_bytes),
        _mib(taken.memory_bytes),
        _mib(peak),
        f"{one.load_seconds:.1f}",
        rate(one.speed.prefill) if one.speed else _NONE,
        rate(decode) if decode else _NONE,
    )


def _mib(num_bytes: int) -> str:
    value = num_bytes / _MIB
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def forms(one: Cost) -> list[str]:
    """What share of the parameters is kept how."""
    total = one.footprint.num_parameters
    return [f"{number / total:.0%} {form}" for form, number in one.footprint.parameters.items()]


def rate(spread: Spread) -> str:
    """The median, and how far the repetitions lie apart."""
    digits = 0 if spread.median >= 100 else 1
    return f"{spread.median:,.{digits}f} ({spread.lowest:,.{digits}f}–{spread.highest:,.{digits}f})"


def _is_worth(name: str, one: Measurement, shown: Sequence[str]) -> tuple[str, ...]:
    measured, apart = one.evaluation, one.divergence
    return (
        name,
        f"{measured.perplexity.perplexity:.3f}" if measured.perplexity else _NONE,
        f"{apart.kl_mean:.3g}" if apart else _NONE,
        f"{apart.top1_agreement:.2%}" if apart else _NONE,
        f"{apart.max_abs_delta_logp:.2g}" if apart else _NONE,
        f"{measured.exact_match:.1%}" if measured.exact_match is not None else _NONE,
        *(
            METRICS[metric].format(measured.metrics[metric])
            if metric in measured.metrics
            else _NONE
            for metric in shown
        ),
    )


def _samples(reporter: Reporter, names: Sequence[str], measured: Sequence[Measurement]) -> None:
    """The same question to each."""
    width = max(map(len, names))
    for sample in measured[0].evaluation.samples[:_NUM_SAMPLES]:
        reporter.say("")
        reporter.say(f"  {sample.question}")
        reporter.say(f"  {'wanted':{width}}  {sample.reference}")
        for name, one in zip(names, measured, strict=True):
            said = next((s for s in one.evaluation.samples if s.origin == sample.origin), None)
            if said is None:
                reporter.say(f"  {name:{width}}  {_NONE} (this row does not fit)")
                continue
            mark = "✓" if said.is_exact else "✗"
            reporter.say(f"  {name:{width}}  {said.answer}  {mark}")


def task_figures(reporter: Reporter, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Figures of lm-eval's tasks, each with its standard error."""
    rows = []
    for task, figures in values.items():
        for key in figures:
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            spread = f"± {error:.4f}" if error is not None else _NONE
            shown = metric if kind == "none" else f"{metric} ({kind})"
            rows.append((task, shown, f"{figures[key]:.4f}", spread, str(figures["num_rows"])))
    reporter.table("Tasks of lm-eval", ("task", "metric", "value", "standard error", "rows"), rows)
