"""What fills the folder of an export: one function for each kind of target."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.artifact.record import CalibrationRecord, MadeFrom, ParentRef, read_record
from qlora_kit.errors import QloraKitError
from qlora_kit.export.jobs import Job
from qlora_kit.export.merge import write_dequantized
from qlora_kit.export.surroundings import save_tokenizer
from qlora_kit.export.targets import ADAPTER_FOR_VLLM
from qlora_kit.quantize.calibration import CalibrationSpec, draw_calibration
from qlora_kit.quantize.source import open_source
from qlora_kit.quantize.texts import find_texts, render_texts
from qlora_kit.recipe import ModelSpec, QuantizationSpec
from qlora_kit.recipe.vllm import max_lora_rank
from qlora_kit.runtime.forward import context_tokens
from qlora_kit.runtime.open import open_runtime

if TYPE_CHECKING:
    from qlora_kit.environment import Hardware
    from qlora_kit.export.trained import TrainedAdapter
    from qlora_kit.quantize.method import Calibration, Made, Source
    from qlora_kit.report.reporter import Reporter
    from qlora_kit.runtime.protocol import Runtime

ADAPTER_GGUF = "adapter.gguf"
_TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Ingredients:
    """What exports of one adapter are made out of."""

    trained: TrainedAdapter
    origin: MadeFrom
    """Of the adapter on its base."""
    held_out: frozenset[tuple[int, ...]]
    """Rows that nothing may be calibrated on."""
    calibration_spec: CalibrationSpec
    hardware: Hardware
    scratch: Path
    reporter: Reporter


@dataclass(frozen=True)
class Content:
    """What is in the folder now, and how it is measured."""

    open: Callable[[], Runtime]
    origin: MadeFrom
    settings: Mapping[str, Any] = field(default_factory=dict)
    gguf_file: str | None = None
    """Whose tokenizer and template llama.cpp reads."""
    calibration: CalibrationRecord | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finish: Callable[[Path], None] | None = None
    measured_as: str = ""
    """Where it is not measured as it stands in the folder: as what."""


Make = Callable[[Job, Ingredients, Path | None, Path], Content]
"""(job, ingredients, the merge that it is made from, the empty folder)"""


def make_adapter(job: Job, given: Ingredients, merged: Path | None, draft: Path) -> Content:
    """PEFT's files as they were trained, with the tokenizer and what ties them to their base."""
    trained = given.trained
    for path in sorted(trained.folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, draft / path.name)
    config = json.loads((draft / "adapter_config.json").read_text(encoding="utf-8"))
    if job.target.name != ADAPTER_FOR_VLLM:
        return Content(lambda: open_runtime(str(draft), _read_as(trained, draft)), given.origin)
    rank = max_lora_rank(config["r"])
    return Content(
        lambda: _on_plain_base(draft, trained, given.hardware),
        given.origin,
        settings={"max_lora_rank": rank},
        measured_as="on the 16-bit base" if "original" in trained.bases else "",
        notes=(f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME=PATH",),
    )


def make_by_method(job: Job, given: Ingredients, merged: Path | None, draft: Path) -> Content:
    """A merge, quantized or converted."""
    assert merged is not None
    opened = open_source(_read_as(given.trained, merged), given.hardware)
    source = replace(opened, is_rounding_told=True)
    made, calibration = _run_method(job, source, given, draft)
    is_file = made.open != "."
    return Content(
        lambda: open_runtime(str(draft / made.open), _read_as(given.trained, draft)),
        of_merge(given.origin, merged),
        settings=_settings(job),
        gguf_file=made.open if is_file and made.open.endswith(".gguf") else None,
        calibration=calibration,
        findings=made.findings,
        notes=made.notes,
        finish=made.finish,
    )


def make_ollama(job: Job, given: Ingredients, merged: Path | None, draft: Path) -> Content:
    """A GGUF file of the merge, and the Modelfile that `ollama create` reads."""
    from qlora_kit.quantize.gguf.ollama.modelfile import write_modelfile
    from qlora_kit.runtime.llama_library import LoadedModel

    content = make_by_method(job, given, merged, draft)
    assert content.gguf_file is not None
    loaded = LoadedModel(draft / content.gguf_file, vocab_only=True)
    try:
        write_modelfile(
            draft,
            content.gguf_file,
            given.trained.tokenizer,
            adds_bos=loaded.adds_bos,
            context_tokens=loaded.context_tokens or None,
        )
    finally:
        loaded.close()
    return content


def make_lora_gguf(job: Job, given: Ingredients, merged: Path | None, draft: Path) -> Content:
    """The base as GGUF with the tokenizer and template that were trained, the adapter beside it."""
    from qlora_kit.quantize.gguf.lora import convert_lora
    from qlora_kit.quantize.gguf.scripts import find_llama_cpp

    trained = given.trained
    if needs_dequantized(job):
        base = write_dequantized(trained, given.scratch / "dequantized", given.reporter)
    else:
        base = base_with_tokenizer(trained, given.scratch / "base")
    source = open_source(_read_as(trained, base), given.hardware)
    made, calibration = _run_method(job, source, given, draft)
    checkout = getattr(job.options, "llama_cpp", None)
    lora = convert_lora(find_llama_cpp(checkout), trained.folder, base, draft / ADAPTER_GGUF)

    def opened() -> Runtime:
        from qlora_kit.runtime.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime.open(draft / made.open, lora=draft / ADAPTER_GGUF)

    return Content(
        opened,
        given.origin,
        settings={**_settings(job), "base": job.base},
        gguf_file=made.open,
        calibration=calibration,
        findings={**made.findings, "adapter": vars(lora)},
        notes=made.notes,
        finish=made.finish,
    )


MAKERS: dict[str, Make] = {
    "adapter": make_adapter,
    "method": make_by_method,
    "ollama": make_ollama,
    "lora-gguf": make_lora_gguf,
}


def of_merge(origin: MadeFrom, merged: Path) -> MadeFrom:
    record = read_record(merged)
    parent = ParentRef(record.kind, str(merged.resolve()), record.sha256)
    return MadeFrom(origin.base, origin.adapter, origin.recipe_sha256, parent)


def needs_dequantized(job: Job) -> bool:
    """Whether an adapter is to stand beside its base as training saw it."""
    return job.target.maker == "lora-gguf" and job.base == "dequantized"


def base_with_tokenizer(trained: TrainedAdapter, folder: Path) -> Path:
    """The base's own files, by links, with the tokenizer and the chat template of training."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(trained.source.folder.iterdir()):
        place = folder / path.name
        if not any(path.match(pattern) for pattern in _TOKENIZER_FILES) and not place.exists():
            place.symlink_to(os.path.realpath(path))
    save_tokenizer(trained.tokenizer, folder)
    return folder


def _run_method(
    job: Job, source: Source, given: Ingredients, draft: Path
) -> tuple[Made, CalibrationRecord | None]:
    assert job.method is not None
    job.method.check(source, job.options)
    calibration = calibration_of(job, source, given)
    made = job.method.make(source, job.options, calibration, draft, given.reporter)
    if calibration is None:
        return made, None
    seed = given.calibration_spec.seed
    return made, CalibrationRecord(calibration.description, calibration.num_tokens, seed)


def calibration_of(job: Job, source: Source, given: Ingredients) -> Calibration | None:
    """Rows that are not among those that the result is measured on; a run's own may be gone where
    it goes without.
    """
    if job.calibration is None:
        return None
    try:
        return _drawn(job.calibration, source, given)
    except QloraKitError as error:
        if job.is_calibration_needed:
            raise
        given.reporter.warn(f"{job.target.name} is made without calibration: {error}")
        return None


def _drawn(name: str, source: Source, given: Ingredients) -> Calibration:
    texts = find_texts(name, "train")
    rendered = render_texts(texts, given.trained.tokenizer)
    rows = [[row for row in part if row.input_ids not in given.held_out] for part in rendered.rows]
    texts = replace(texts, description=rendered.description)
    context = context_tokens(source.skeleton.model)
    return draw_calibration(texts, rows, given.calibration_spec, context)


def _settings(job: Job) -> dict[str, Any]:
    options = {} if job.options is None else job.options.model_dump(mode="json")
    return {"method": job.target.method, **options}


def _read_as(trained: TrainedAdapter, folder: Path) -> ModelSpec:
    return ModelSpec(
        name_or_path=str(folder),
        allow_pickle=trained.allow_pickle,
        trust_remote_code=trained.trust_remote_code,
    )


def _on_plain_base(adapter: Path, trained: TrainedAdapter, hardware: Hardware) -> Runtime:
    """The adapter on the base as a server holds it: in 16 bits, where there are 16."""
    import torch

    from qlora_kit.environment import resolve_compute_dtype
    from qlora_kit.model.base import load_base
    from qlora_kit.model.saved import load_adapter
    from qlora_kit.runtime.transformers import TransformersRuntime

    if "original" not in trained.bases:
        return open_runtime(str(adapter), _read_as(trained, adapter))
    plain = QuantizationSpec(load_in_4bit=False)
    dtype, why = resolve_compute_dtype("auto", hardware)
    spec = _read_as(trained, trained.source.folder)
    base = load_base(spec, plain, getattr(torch, dtype), why, hardware, adapter=adapter)
    model, _ = load_adapter(base, plain, adapter, force=True)
    return TransformersRuntime.on_base(str(adapter), model, base, adapter)
