"""What a person is told of a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_kit.report.reporter import Reporter


def quantized(reporter: Reporter, certificate: Mapping[str, Any], out: str) -> None:
    """Source and result side by side, what was found, and whether the budget was met."""
    figures = certificate["divergence"]
    before, after = certificate["footprints"]["source"], certificate["footprints"]["quantized"]
    reporter.table(
        f"{certificate['method']} against its source on {figures['num_tokens']:,} tokens",
        ("", "perplexity", "KL", "same top token", "disk MB", "memory MB", "parameters"),
        (
            _row("source", figures["reference_perplexity"], "", "", before),
            _row(
                certificate["method"],
                figures["candidate_perplexity"],
                f"{figures['kl_mean']:.3g}",
                f"{figures['top1_agreement']:.1%}",
                after,
            ),
        ),
    )
    for note in certificate["notes"]:
        reporter.say(note)
    if certificate["passed"]:
        reporter.say(f"The quantized model is in {out}.")
    else:
        reporter.warn(
            f"mean KL {figures['kl_mean']:.3g} exceeds the budget of {certificate['max_kl']:g} "
            f"nats per token; the model is kept in {out}"
        )


def _row(
    name: str, perplexity: float, kl: str, agreement: str, footprint: Mapping[str, Any]
) -> tuple[str, ...]:
    forms = ", ".join(f"{number:,} {form}" for form, number in footprint["parameters"].items())
    return (
        name,
        f"{perplexity:.3f}",
        kl,
        agreement,
        f"{footprint['disk_bytes'] / 1e6:,.1f}",
        f"{footprint['memory_bytes'] / 1e6:,.1f}",
        forms,
    )
