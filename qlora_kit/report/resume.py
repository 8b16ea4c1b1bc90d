"""What a proof of resuming says to a person."""

from __future__ import annotations

from qlora_kit.prove import Proof, Trace, apart, differences
from qlora_kit.report.reporter import Reporter


def show_proof(reporter: Reporter, proof: Proof) -> None:
    """One row for each thing compared, and the verdict."""
    whole, resumed = proof.whole, proof.resumed
    different = differences(whole, resumed)
    rows = [("loss stream", _losses(whole), _losses(resumed), _yes("losses", different))]
    for name, key in (
        ("order of the data", "order"),
        ("adapter, SHA-256", "adapter"),
        ("optimizer, SHA-256", "optimizer"),
    ):
        digests = getattr(whole, key)[:16], getattr(resumed, key)[:16]
        rows.append((name, *digests, _yes(key, different)))
    reporter.table(
        f"left alone, and killed after update {proof.killed_after} and gone on with",
        ("", "left alone", "gone on with", "the same"),
        rows,
    )
    reporter.say(_verdict(proof, different))


def _verdict(proof: Proof, different: tuple[str, ...]) -> str:
    if not different:
        return "verdict   exact: the killed run is the uninterrupted one, to the last bit."
    by = apart(proof.whole, proof.resumed)
    if proof.repeated is not None and differences(proof.whole, proof.repeated):
        noise = apart(proof.whole, proof.repeated)
        what = "as exact as this hardware repeats itself" if proof.holds else "NOT exact"
        return (
            f"verdict   {what}: losses differ by up to {by:.2g}, those of two uninterrupted runs "
            f"by up to {noise:.2g}."
        )
    return (
        f"verdict   NOT exact: {', '.join(different)} differ (losses by up to {by:.2g}), and two "
        "uninterrupted runs do not. Please report this with the recipe."
    )


def _losses(trace: Trace) -> str:
    return f"{trace.losses[0]:.6f} → {trace.losses[-1]:.6f}"


def _yes(name: str, different: tuple[str, ...]) -> str:
    return "no" if name in different else "yes"
