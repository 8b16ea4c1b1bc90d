"""From a merged model to the quantized one that training saw, certified against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.atomic import draft_beside, flush_folder
from qlora_kit.export.certify import certify, measure
from qlora_kit.export.choose import measured_rows, show_candidates
from qlora_kit.export.merge import MergeResult, require_absent
from qlora_kit.export.quantized import Quantizer, write_quantized
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qlora_kit.environment import Hardware
    from qlora_kit.evaluate.divergence import Recorded
    from qlora_kit.export.trained import TrainedAdapter
    from qlora_kit.recipe import MergeSpec


def quantized_beside(merged: Path) -> Path:
    """`quantized` beside a run's `merged`, and X-quantized beside any other X."""
    return merged.with_name("quantized" if merged.name == "merged" else f"{merged.name}-quantized")


def quantize_and_certify(
    trained: TrainedAdapter,
    recorded: Recorded,
    merged: Path,
    options: MergeSpec,
    hardware: Hardware,
    *,
    recipe_sha256: str | None = None,
    chain: Sequence[Mapping[str, Any]] = (),
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Quantize the model in `merged` as training did, measure it, and put it beside.

    Returns its certificate. `chain` are the rows of an export ledger that lead to `merged`.

    Raises:
        RunError: something is there already. ModelError: it cannot be stored so.
    """
    assert trained.aware is not None
    out = quantized_beside(merged)
    require_absent(out)
    quantizer = Quantizer(trained.skeleton, trained.aware, trained.compute_dtype, trained.device)
    with draft_beside(out) as draft:
        folder = draft / "quantized"
        folder.mkdir()
        written = write_quantized(merged, folder, quantizer, options.max_shard_bytes, reporter)
        result = MergeResult(
            folder=folder,
            base="original",
            dtype=trained.aware.spec.method,
            survival=None,
            tied=_is_tied(merged),
            num_modules=written.num_modules,
            num_bytes=written.num_bytes,
            seconds=written.seconds,
        )
        candidate = measure(result, trained, recorded, options.max_kl, hardware, reporter)
        measured_on = measured_rows(len(recorded.windows), options.max_rows)
        show_candidates([candidate], candidate, options.max_kl, reporter, measured_on=measured_on)
        for fault in candidate.faults:
            reporter.warn(f"the quantized model does not come back as it was: {fault}")
        certificate = certify(
            candidate, [candidate], trained, options.max_kl, recipe_sha256, out, chain
        )
        flush_folder(folder)
        folder.rename(out)
    return certificate


def _is_tied(merged: Path) -> bool:
    """Whether embedding and head are one tensor in what was merged."""
    from qlora_kit.model.skeleton import load_config

    return bool(load_config(merged).get_text_config().tie_word_embeddings)
