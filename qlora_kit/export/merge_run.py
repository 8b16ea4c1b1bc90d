"""The builder of this package: from a trained adapter to a certified folder.

Called right after training, while the adapter is in memory, or later on a run directory or an
adapter folder.
"""

from __future__ import annotations

import gc
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.atomic import draft_beside, flush_folder
from qlora_kit.checkpoint.run_directory import RunDirectory
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.environment import Hardware
from qlora_kit.errors import DataError, RunError
from qlora_kit.evaluate.divergence import Recorded, record_logprobs
from qlora_kit.export.certify import BATCH_SIZE, certify, measure
from qlora_kit.export.choose import choose_base, measured_rows, show_candidates
from qlora_kit.export.merge import QuantType, merge_adapter, predict_bytes, require_absent
from qlora_kit.export.quantized_run import quantize_and_certify, quantized_beside
from qlora_kit.export.reopen import Reopened
from qlora_kit.export.shards import require_room
from qlora_kit.export.trained import BaseKind, TrainedAdapter, trained_adapter
from qlora_kit.recipe import MergeSpec, Recipe, recipe_hash
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.forward import CausalScorer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftModel

    from qlora_kit.data.prepare import Part
    from qlora_kit.model.base import Base


def merge_after_training(
    model: PeftModel,
    base: Base,
    held_out: Part,
    recipe: Recipe,
    run: RunDirectory,
    hardware: Hardware,
    reporter: Reporter = SILENT,
) -> dict[str, Any] | None:
    """Merge what is in memory into `run.merged`, where the recipe asks for it.

    The adapter must be saved in `run.adapter`. Returns the certificate; its `passed` says
    whether the budget was met. After a training that was aware of quantization it is that of the
    quantized model beside.

    Raises:
        QloraKitError: what `merge_adapter` raises; nothing is half-written.
    """
    if not recipe.export.merge:
        return None
    options = recipe.export.merge_options
    trained = trained_adapter(run.adapter, base, recipe.quantization, recipe.model)
    _make_way(run.merged)
    _make_way(quantized_beside(run.merged))
    with draft_beside(run.merged) as draft:
        recorded = record_reference(
            model, trained, held_out.sequences[: options.max_rows], draft, reporter
        )
        return merge_and_certify(
            trained,
            recorded,
            run.merged,
            options,
            hardware,
            recipe_sha256=recipe_hash(recipe),
            reporter=reporter,
        )


def _make_way(merged: Path) -> None:
    """An attempt that was killed before its summary was written may have merged already.

    The certificate goes into the summary, and the model may be of another adapter by now: it is
    made again. First out of sight, so that half a model never stands under its name; what is
    out of sight, drafts as large as a model among it, is removed.
    """
    if merged.exists():
        merged.rename(merged.with_name(f".{merged.name}.{uuid.uuid4().hex}.draft"))
    for leftover in merged.parent.glob(f".{merged.name}.*.draft"):
        shutil.rmtree(leftover)


def merge_reopened(
    reopened: Reopened,
    out: Path,
    options: MergeSpec,
    hardware: Hardware,
    *,
    requantize_to: QuantType | None = None,
    is_on_the_way: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Merge an adapter that was opened from the disk (see `reopen_adapter`) into `out`.

    The model is recorded first and then forgotten, so that it and the merged one need not fit
    into memory together.

    Args:
        is_on_the_way: to a quantized model, which is what a budget is for.
    """
    require_absent(out)
    if reopened.trained.aware is not None:
        require_absent(quantized_beside(out))
        if requantize_to is not None:
            raise RunError(
                f"--requantize {requantize_to}: it was trained quantized to "
                f"{reopened.trained.aware.spec.method}, and that model is written beside the "
                "merged one; leave it out."
            )
    with draft_beside(out) as draft:
        rows = reopened.held_out[: options.max_rows]
        recorded = record_reference(reopened.take_model(), reopened.trained, rows, draft, reporter)
        gc.collect()
        if hardware.device == "cuda":
            torch.cuda.empty_cache()
        return merge_and_certify(
            reopened.trained,
            recorded,
            out,
            options,
            hardware,
            recipe_sha256=reopened.recipe_sha256,
            requantize_to=requantize_to,
            is_on_the_way=is_on_the_way,
            reporter=reporter,
        )


def record_reference(
    model: PeftModel,
    trained: TrainedAdapter,
    rows: Sequence[TokenSequence],
    folder: Path,
    reporter: Reporter = SILENT,
) -> Recorded:
    """What the graph that was trained says on held-out rows.

    Raises:
        DataError: there are none.
    """
    if not rows:
        raise DataError(
            "a merge is measured on held-out rows, and there are none; name some in data.eval."
        )
    num_tokens = sum(row.num_supervised for row in rows)
    with reporter.progress("measuring (as trained)", num_tokens) as progress:
        return record_logprobs(
            CausalScorer(model, trained.tokenizer.pad_token_id, trained.compute_dtype),
            rows,
            folder,
            batch_size=BATCH_SIZE,
            progress=progress,
        )


def merge_and_certify(
    trained: TrainedAdapter,
    recorded: Recorded,
    out: Path,
    options: MergeSpec,
    hardware: Hardware,
    *,
    recipe_sha256: str | None = None,
    requantize_to: QuantType | None = None,
    is_on_the_way: bool = False,
    chain: Sequence[Mapping[str, Any]] = (),
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Merge into each base that `options` allows, measure, keep one in `out`.

    Returns its certificate; after a training that was aware of quantization that of the quantized
    model, which is put beside. `chain` are the rows of an export ledger that lead to it.

    Raises:
        RunError, ModelError, AdapterError, HardwareError: as `merge_adapter`; `out` is not there.
    """
    require_absent(out)
    bases: tuple[BaseKind, ...] = trained.bases if options.base == "auto" else (options.base,)
    max_kl = None if is_on_the_way or trained.aware is not None else options.max_kl
    needed = sum(predict_bytes(trained, base, options.dtype) for base in bases)
    require_room(out, needed * (1 if trained.aware is None else 2))
    with draft_beside(out) as draft:
        candidates = []
        for base in bases:
            result = merge_adapter(
                trained,
                base,
                draft / base,
                dtype=options.dtype,
                max_shard_bytes=options.max_shard_bytes,
                requantize_to=requantize_to,
                reporter=reporter,
            )
            candidates.append(measure(result, trained, recorded, max_kl, hardware, reporter))
        chosen = choose_base(candidates)
        measured_on = measured_rows(len(recorded.windows), options.max_rows)
        show_candidates(candidates, chosen, max_kl, reporter, measured_on=measured_on)
        for fault in chosen.faults:
            reporter.warn(f"the merged model does not come back as it was: {fault}")
        certificate = certify(chosen, candidates, trained, max_kl, recipe_sha256, out, chain)
        for note in certificate["notes"]:
            reporter.warn(note)
        flush_folder(chosen.result.folder)
        chosen.result.folder.rename(out)
    if trained.aware is None:
        return certificate
    return quantize_and_certify(
        trained,
        recorded,
        out,
        options,
        hardware,
        recipe_sha256=recipe_sha256,
        chain=certificate.get("ledger", ()),
        reporter=reporter,
    )
