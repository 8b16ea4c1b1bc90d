"""What a verb works on when it is given RUN|MODEL: a run, an adapter folder, or a whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.checkpoint.run_directory import RunDirectory, is_run, open_run
from qlora_kit.environment import probe_hardware, resolve_compute_dtype
from qlora_kit.errors import AdapterError, HardwareError
from qlora_kit.model.base import Base, load_base, prepare_for_training, upcasts_norms
from qlora_kit.model.manifest import (
    MANIFEST_FILE,
    base_of,
    computed_as,
    read_manifest,
    stored_settings,
)
from qlora_kit.model.prequantized import stored_quantization
from qlora_kit.model.saved import load_adapter
from qlora_kit.recipe import ModelSpec, QuantizationSpec, Recipe
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured or talked to."""

    name: str
    model: PeftModel | PreTrainedModel
    base: Base
    run: RunDirectory | None
    recipe: Recipe | None
    """Of the run; None for a model that is not one."""
    adapter: Path | None = None
    """The folder that the adapter was read from."""

    @property
    def has_adapter(self) -> bool:
        return self.model is not self.base.model


def load_subject(
    name: str, model_spec: ModelSpec | None = None, force: bool = False, reporter: Reporter = SILENT
) -> Subject:
    """Load a run (its base with its adapter), an adapter folder, or a model as it stands.

    `model_spec` says how a model is read (trust_remote_code, allow_pickle, chat_template); its
    revision, GGUF file and tokenizer are those of the model that it names, and of no other.

    Raises:
        QloraKitError: nothing of the kind is there, or the adapter belongs to another base.
    """
    folder = Path(name).expanduser()
    read_as = model_spec or ModelSpec(name_or_path=name)
    if is_run(folder):
        run, recipe = open_run(folder)
        quantization = recipe.quantization
        if (run.adapter / MANIFEST_FILE).is_file():
            quantization = computed_as(read_manifest(run.adapter), quantization, run.adapter)
        model, base = _with_adapter(recipe.model, quantization, run.adapter, force, reporter)
        return Subject(name, model, base, run, recipe, run.adapter)
    if (folder / "adapter_config.json").is_file():
        spec, quantization = _from_manifest(folder, read_as)
        model, base = _with_adapter(spec, quantization, folder, force, reporter)
        return Subject(name, model, base, None, None, folder)
    base = _plain(read_as if read_as.name_or_path == name else _read_alike(name, read_as))
    return Subject(name, base.model, base, None, None)


def _with_adapter(
    spec: ModelSpec,
    quantization: QuantizationSpec,
    adapter: Path,
    force: bool,
    reporter: Reporter,
) -> tuple[PeftModel, Base]:
    base = _load(spec, _native(quantization), adapter, reporter)
    # The graph that was trained, with its norms in float32 if it had them so.
    prepare_for_training(base.model, upcasts_norms(quantization, base.compute_dtype))
    model, findings = load_adapter(base, quantization, adapter, force)
    for finding in findings:
        reporter.warn(finding)
    return model, base


def _from_manifest(folder: Path, read_as: ModelSpec) -> tuple[ModelSpec, QuantizationSpec]:
    if not (folder / MANIFEST_FILE).is_file():
        raise AdapterError(
            f"{folder} is an adapter without {MANIFEST_FILE}, so nobody knows how its base was "
            "quantized; give the run's folder instead."
        )
    manifest = read_manifest(folder)
    return base_of(manifest, read_as), stored_settings(manifest, folder)


def _native(quantization: QuantizationSpec) -> QuantizationSpec:
    """An adapter trained in what this machine only emulates is computed in what it has."""
    try:
        resolve_compute_dtype(quantization.compute_dtype, probe_hardware())
    except HardwareError:
        return quantization.model_copy(update={"compute_dtype": "auto"})
    return quantization


def _read_alike(name: str, read_as: ModelSpec) -> ModelSpec:
    """Another model, with the same trust in it."""
    return ModelSpec(
        name_or_path=name,
        chat_template=read_as.chat_template,
        attn_implementation=read_as.attn_implementation,
        trust_remote_code=read_as.trust_remote_code,
        allow_pickle=read_as.allow_pickle,
    )


def _plain(spec: ModelSpec) -> Base:
    """A model as it stands on disk: quantized if it is stored so, by whatever library, else in 16
    or 32 bits.
    """
    return _load(spec, stored_quantization(spec) or QuantizationSpec(load_in_4bit=False))


def _load(
    spec: ModelSpec,
    quantization: QuantizationSpec,
    adapter: Path | None = None,
    reporter: Reporter = SILENT,
) -> Base:
    hardware = probe_hardware()
    dtype, why = resolve_compute_dtype(quantization.compute_dtype, hardware)
    return load_base(
        spec,
        quantization,
        getattr(torch, dtype),
        why,
        hardware,
        adapter=adapter,
        reporter=reporter,
    )
