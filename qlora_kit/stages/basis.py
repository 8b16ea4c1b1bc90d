"""What the numbers of a run rest on, and the checkpoint to go on from where that still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.checkpoint.entry import Entry, require_same_work
from qlora_kit.checkpoint.fingerprints import Fingerprints, SourcePrint
from qlora_kit.data.prepare import fingerprint_of
from qlora_kit.environment import Hardware
from qlora_kit.model.tokenizer import template_hash, tokenizer_hash
from qlora_kit.processes import Processes
from qlora_kit.recipe import Recipe
from qlora_kit.report import narrate
from qlora_kit.report.reporter import Reporter
from qlora_kit.stages.prepare import Prepared
from qlora_kit.train.continuation import Continuation
from qlora_kit.versions import kit_version, package_versions

if TYPE_CHECKING:
    from collections.abc import Sequence


def fingerprints(recipe: Recipe, ready: Prepared, hardware: Hardware) -> Fingerprints:
    """What the numbers of training depend on, besides the recipe."""
    versions = package_versions()
    return Fingerprints(
        base=ready.base.fingerprint,
        tokenizer=tokenizer_hash(ready.base.tokenizer),
        chat_template=template_hash(ready.base.tokenizer) or "",
        data_train=fingerprint_of(ready.train),
        data_eval=fingerprint_of(ready.held_out),
        packages=", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        hardware=hardware.device_name,
        compute=str(ready.base.compute_dtype).removeprefix("torch."),
        native_bf16="yes" if hardware.native_bf16 else "no",
        qlora_kit=kit_version(),
        model_config=ready.base.configured,
    )


def sources_read(recipe: Recipe, ready: Prepared) -> tuple[SourcePrint, ...]:
    """The sources of both parts of the data, each with its digest and number of rows."""
    named = {"train": recipe.data.train, "eval": recipe.data.eval or recipe.data.train}
    return tuple(
        SourcePrint(part, source.name, digest, read.ledger.rows_of.get(source.name))
        for part, read in (("train", ready.train), ("eval", ready.held_out))
        for source, digest in zip(named[part], read.digests, strict=False)
    )


def continuation_of(
    entry: Entry,
    prints: Fingerprints,
    sources: Sequence[SourcePrint],
    allow_drift: bool,
    processes: Processes,
    reporter: Reporter,
) -> Continuation | None:
    """The checkpoint that training goes on from, once nothing has changed that it rests on."""
    checkpoint = entry.checkpoint
    if checkpoint is None:
        return None
    drift = processes.together(
        lambda: require_same_work(checkpoint, prints, allow_drift, sources, entry.undecided)
    )
    narrate.drift(reporter, drift)
    return processes.together(lambda: Continuation.read(checkpoint, allow_drift))
