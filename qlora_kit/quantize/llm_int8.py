"""`llm-int8`: 8 bits by bitsandbytes, activations too, their outlier features in 16 bits.

Dettmers et al. 2022, https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from qlora_kit.model.base import bitsandbytes_config
from qlora_kit.quantize.errors_by_layer import Layers
from qlora_kit.quantize.layers import quantized_layers, require_quantizable, shape_of
from qlora_kit.quantize.load import computing_dtype, kept_dtype, load_source, save_checked
from qlora_kit.quantize.method import (
    Calibration,
    CalibrationNeed,
    Made,
    Method,
    MethodOptions,
    Source,
)
from qlora_kit.recipe import QuantizationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.report.reporter import Reporter

_LAYER_BYTES = 512  # of a layer's entries in the header
_FOR_A_GPU = "with fp32_cpu_offload it is for a machine with a GPU; one without cannot load it"


class LlmInt8Options(MethodOptions):
    """Options of llm-int8."""

    threshold: float = Field(default=6.0, ge=0)
    """Features of a layer's input in which any token is this large are multiplied in 16 bits; 0
    multiplies all in 8."""

    skip_modules: tuple[str, ...] = ()
    """Linear layers to leave as they are, by name or part of one, beside the output head."""

    fp32_cpu_offload: tuple[str, ...] = ()
    """Modules that are to run on the CPU while the rest is on a GPU: their layers stay
    unquantized, and the checkpoint allows a `device_map` that puts them there."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What everything else is kept in; auto: as the source has it."""

    @property
    def all_skips(self) -> tuple[str, ...]:
        return (*self.skip_modules, *self.fp32_cpu_offload)


def method(name: str) -> Method:
    return Method(
        name=name,
        options=LlmInt8Options,
        check=_check,
        predict_bytes=_predict_bytes,
        make=_make,
        calibration=_calibration,
    )


def _calibration(options: LlmInt8Options) -> CalibrationNeed:
    """It is quantized without; the report of outlier features needs text."""
    return "optional" if options.threshold else "none"


def _check(source: Source, options: LlmInt8Options) -> None:
    require_quantizable(source, options.all_skips, "llm-int8")


def _predict_bytes(source: Source, options: LlmInt8Options) -> int:
    model = source.skeleton.model
    names = quantized_layers(source.skeleton, options.all_skips)
    shapes = [shape_of(model.get_submodule(name)) for name in names]
    integers = sum(math.prod(shape) for shape in shapes)
    scales = sum(4 * rows for rows, _ in shapes)
    rest = (source.num_parameters - integers) * kept_dtype(source, options.dtype).itemsize
    return integers + scales + rest + _LAYER_BYTES * len(names)


def _make(
    source: Source,
    options: LlmInt8Options,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    from qlora_kit.quantize.watched import WatchedConfig

    names = quantized_layers(source.skeleton, options.all_skips)
    outliers = None
    if calibration is not None:
        outliers = find_outliers(source, names, options.threshold, calibration, reporter)
    spec = QuantizationSpec(
        load_in_8bit=True,
        int8_threshold=options.threshold,
        skip_modules=options.all_skips,
    )
    dtype = kept_dtype(source, options.dtype)
    stock = bitsandbytes_config(spec, source.skeleton, dtype)
    assert stock is not None
    layers = Layers()

    def load() -> PreTrainedModel:
        with reporter.progress("quantizing to llm-int8", len(names)) as progress:
            return load_source(source, dtype, WatchedConfig(stock, layers.watch(progress)))

    save_checked(load, source, draft)
    findings = layers.findings()
    notes = layers.notes()
    if outliers is None and options.threshold:
        notes = (*notes, "name --calibration to see which features of which layers are outliers")
    if outliers is not None:
        findings["outliers"] = outliers
        notes = (*notes, _summary(outliers, options.threshold))
    if not options.fp32_cpu_offload:
        return Made(findings=findings, notes=notes)
    return Made(findings=findings, notes=(*notes, _FOR_A_GPU), finish=_allow_offload)


def _allow_offload(draft: Path) -> None:
    """What a `device_map` with CPU and GPU asks for. On a machine without a GPU transformers then
    takes all layers for unquantized, so it is set last.
    """
    path = draft / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_outliers(
    source: Source,
    names: list[str],
    threshold: float,
    calibration: Calibration,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """By layer: which features of its input reach the threshold in any token, and how far."""
    from qlora_kit.quantize.int8.observe import observe

    largest: dict[str, torch.Tensor] = {}

    def look(layer: str, inputs: torch.Tensor) -> None:
        seen = inputs.float().abs().amax(dim=0)
        largest[layer] = torch.maximum(largest[layer], seen) if layer in largest else seen

    model = load_source(source, computing_dtype(source))
    observe(model, names, calibration.sequences, look, reporter)
    del model
    gc.collect()
    return {name: _outliers(seen, threshold) for name, seen in largest.items()}


def _outliers(largest: torch.Tensor, threshold: float) -> dict[str, Any]:
    """largest: (I,), the largest |x| of each feature. As LLM.int8() has it: |x| ≥ threshold."""
    features = torch.nonzero(largest >= threshold).flatten().tolist()
    return {
        "num_features": len(largest),
        "outlier_features": features,
        "largest": float(largest.amax()),
    }


def _summary(outliers: dict[str, dict[str, Any]], threshold: float) -> str:
    having = {name: one for name, one in outliers.items() if one["outlier_features"]}
    if not having:
        return f"no feature of any layer's input reaches {threshold:g} on the calibration text"
    most = max(having, key=lambda name: len(having[name]["outlier_features"]))
    count = len(having[most]["outlier_features"])
    return (
        f"{len(having)} of {len(outliers)} layers have features that reach {threshold:g}, most in "
        f"{most}: {count} of {having[most]['num_features']}"
    )
