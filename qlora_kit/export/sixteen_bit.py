"""The 16-bit model that a run stands for when it is quantized anew.

What training saw was quantized already: quantizing its dequantized weights again loses most of a
light adapter, where the merge into the original weights keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.atomic import draft_beside
from qlora_kit.checkpoint.run_directory import is_run, open_run
from qlora_kit.environment import probe_hardware
from qlora_kit.export.merge_run import merge_reopened
from qlora_kit.export.places import Places, places_of
from qlora_kit.export.rehearsal import expected_source
from qlora_kit.export.reopen import reopen_adapter
from qlora_kit.export.trained import BaseKind
from qlora_kit.quantize.held_out import Named
from qlora_kit.quantize.quantize import Request, examine
from qlora_kit.recipe import MergeSpec, ModelSpec
from qlora_kit.records import file_sha256

if TYPE_CHECKING:
    from qlora_kit.report.reporter import Reporter


@contextmanager
def sixteen_bit(request: Request, reporter: Reporter) -> Iterator[Request]:
    """The same request for a whole model in 16 bits, while the context lasts.

    Of a run that is its merge into the original weights: one that it has of this very adapter, or
    one that is made and thrown away. Without other text it is compared on the run's own eval rows.
    """
    run = Path(request.model.name_or_path).expanduser()
    if not is_run(run) and not (run / "adapter_config.json").is_file():
        yield request
        return
    places = places_of(run)
    request = replace(request, texts=_own_texts(request.texts, places))
    merge = _merge_of(run, places)
    if merge is not None:
        reporter.say(f"merge     {merge} is there, and is of this adapter")
        note = f"the 16-bit merge of {run.resolve().name}"
        yield replace(request, model=_at(request.model, merge), note=note)
        return
    hardware = probe_hardware()
    reporter.say(f"{run} is merged into its 16-bit base first; that merge is not kept.")
    with draft_beside(request.out) as scratch:
        reopened = reopen_adapter(run, hardware, read_as=request.model, reporter=reporter)
        examine(request, expected_source(reopened.trained, scratch / "rehearsal", hardware))
        base: BaseKind = "original" if "original" in reopened.trained.bases else "dequantized"
        if base == "dequantized":
            reporter.warn(
                "the base is stored quantized, so there are no 16-bit weights to merge into; "
                "quantizing it again loses part of the adapter."
            )
        merged = scratch / "merged"
        options = MergeSpec(base=base)
        merge_reopened(reopened, merged, options, hardware, is_on_the_way=True, reporter=reporter)
        del reopened
        whose = "16-bit" if base == "original" else "dequantized"
        note = f"{run.resolve().name}, merged into its {whose} base"
        model = _at(request.model, merged)
        yield replace(request, model=model, note=note, keeps_source=False)


def _own_texts(texts: Named, places: Places) -> Named:
    """The run's eval rows, whatever calibrates, unless other text is named."""
    if texts.data is not None or places.recipe is None:
        return texts
    has_eval_rows = open_run(places.folder)[1].data.has_eval_rows
    return Named(texts.calibration, str(places.recipe)) if has_eval_rows else texts


def _at(model: ModelSpec, folder: Path) -> ModelSpec:
    return model.model_copy(update={"name_or_path": str(folder)})


def _merge_of(run: Path, places: Places) -> Path | None:
    """One into the original weights that is there and whole, of the adapter as it is now."""
    weights = (open_run(run)[0].adapter if is_run(run) else run) / "adapter_model.safetensors"
    if not weights.is_file():
        return None
    return places.fitting_merge("original", file_sha256(weights))
