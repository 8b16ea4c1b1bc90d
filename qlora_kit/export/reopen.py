"""An adapter from the disk, back on its base, with rows to measure it on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.checkpoint.run_directory import is_run, open_run
from qlora_kit.data.prepare import prepare_eval
from qlora_kit.data.read import require_readable
from qlora_kit.environment import Hardware
from qlora_kit.errors import AdapterError, DataError
from qlora_kit.export.delta import read_config
from qlora_kit.export.trained import TrainedAdapter, trained_adapter
from qlora_kit.model.base import load_base, prepare_for_training, upcasts_norms
from qlora_kit.model.manifest import (
    MANIFEST_FILE,
    Manifest,
    base_of,
    computed_as,
    read_manifest,
    stored_settings,
)
from qlora_kit.model.saved import load_adapter
from qlora_kit.recipe import DataSpec, ModelSpec, QuantizationSpec, SourceSpec, recipe_hash
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from qlora_kit.data.sequences import TokenSequence


@dataclass
class Reopened:
    """A trained adapter in memory."""

    trained: TrainedAdapter
    held_out: Sequence[TokenSequence]
    recipe_sha256: str | None
    _model: PeftModel | None

    def take_model(self) -> PeftModel:
        """The adapter on its base; given away once, so that it can be freed."""
        model, self._model = self._model, None
        assert model is not None, "the model was taken already"
        return model


@dataclass(frozen=True)
class _Origin:
    """What an adapter folder was made from."""

    folder: Path
    model: ModelSpec
    quantization: QuantizationSpec
    compute_dtype: torch.dtype
    data: DataSpec | None
    recipe_sha256: str | None


def reopen_adapter(
    folder: Path,
    hardware: Hardware,
    *,
    data: Path | None = None,
    force: bool = False,
    read_as: ModelSpec | None = None,
    reporter: Reporter = SILENT,
) -> Reopened:
    """Open a run directory or an adapter folder.

    `data` is a file of held-out rows instead of the run's own. `read_as` says whether the base of
    an adapter folder may run its own code or be read from pickles; a run's recipe says so. With
    `force`, an adapter without a manifest is taken to belong to the base its PEFT files name, kept
    in 4 bits as by default.

    Raises:
        RunError: no such run. AdapterError: no adapter, or another base's. DataError: no rows.
    """
    if is_run(folder):
        origin = _of_run(folder)
    else:
        read_as = read_as or ModelSpec(name_or_path=str(folder))
        origin = _of_adapter(folder, hardware, force, read_as)
    spec = origin.data
    if data is not None:
        spec = _measured_on(data, spec)
    if spec is None or not spec.has_eval_rows:
        raise DataError(
            f"{folder} names no held-out rows to measure the merge on; name a file with --data."
        )
    require_readable(spec.eval)
    _warn_of_emulation(origin.compute_dtype, hardware, reporter)
    own_tokenizer = (origin.folder / "tokenizer_config.json").is_file()
    base = load_base(
        origin.model,
        origin.quantization,
        origin.compute_dtype,
        "as in training",
        hardware,
        adapter=origin.folder if own_tokenizer else None,
    )
    prepare_for_training(base.model, upcasts_norms(origin.quantization, origin.compute_dtype))
    held_out = prepare_eval(spec, base.tokenizer, base.stop_ids)
    model, findings = load_adapter(base, origin.quantization, origin.folder, force)
    for finding in findings:
        reporter.warn(finding)
    return Reopened(
        trained_adapter(origin.folder, base, origin.quantization, origin.model),
        held_out.sequences,
        origin.recipe_sha256,
        model,
    )


def _measured_on(data: Path, spec: DataSpec | None) -> DataSpec:
    """The same rendering, with the rows of a file for eval rows."""
    sources = (SourceSpec(path=str(data)),)
    if spec is None:
        return DataSpec(train=sources, eval=sources)
    return spec.model_copy(update={"eval": sources, "held_out": None})


def _of_run(folder: Path) -> _Origin:
    run, recipe = open_run(folder)
    manifest = read_manifest(run.adapter)
    return _Origin(
        folder=run.adapter,
        model=recipe.model,
        quantization=computed_as(manifest, recipe.quantization, run.adapter),
        compute_dtype=_compute_dtype(manifest),
        data=recipe.data,
        recipe_sha256=recipe_hash(recipe),
    )


def _of_adapter(folder: Path, hardware: Hardware, force: bool, read_as: ModelSpec) -> _Origin:
    if is_run(folder.parent) and folder.name == "adapter":
        return _of_run(folder.parent)
    config = read_config(folder)
    if (folder / MANIFEST_FILE).is_file() or not force:
        manifest = read_manifest(folder)
        return _Origin(
            folder=folder,
            model=base_of(manifest, read_as),
            quantization=stored_settings(manifest, folder),
            compute_dtype=_compute_dtype(manifest),
            data=None,
            recipe_sha256=manifest.recipe_sha256,
        )
    if not config.base_model_name_or_path:
        raise AdapterError(f"{folder} does not name its base, not even in PEFT's own files.")
    dtype = torch.bfloat16 if hardware.native_bf16 else torch.float32
    return _Origin(
        folder=folder,
        model=ModelSpec(
            name_or_path=config.base_model_name_or_path,
            revision=config.revision,
            trust_remote_code=read_as.trust_remote_code,
            allow_pickle=read_as.allow_pickle,
        ),
        quantization=QuantizationSpec(),
        compute_dtype=dtype,
        data=None,
        recipe_sha256=None,
    )


def _compute_dtype(manifest: Manifest) -> torch.dtype:
    dtype = getattr(torch, str(manifest.quantization.get("compute_dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"{MANIFEST_FILE} does not say what the adapter was trained in.")
    return dtype


def _warn_of_emulation(dtype: torch.dtype, hardware: Hardware, reporter: Reporter) -> None:
    """It is measured in the precision it was trained in, wherever that is."""
    native = {torch.bfloat16: hardware.native_bf16, torch.float16: hardware.native_fp16}
    if not native.get(dtype, True):
        name = str(dtype).removeprefix("torch.")
        reporter.warn(f"trained in {name}, which is slow here: {hardware.reason}.")
