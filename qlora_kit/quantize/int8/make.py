"""`int8` for the straight line of `qlora-kit quantize`."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from qlora_kit.errors import Fault, ModelError
from qlora_kit.quantize.errors_by_layer import Layers
from qlora_kit.quantize.layers import (
    quantized_layers,
    require_quantizable,
    shape_of,
    skipped_names,
)
from qlora_kit.quantize.load import computing_dtype, kept_dtype, load_source, save_checked
from qlora_kit.quantize.method import (
    Calibration,
    CalibrationNeed,
    Made,
    Method,
    MethodOptions,
    Source,
)
from qlora_kit.recipe.base import without_effect

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.report.reporter import Reporter

_LAYER_BYTES = 512  # of a layer's entries in the header


class Int8Options(MethodOptions):
    """Options of int8."""

    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares a scale: a layer's whole weight, an output channel, or a group of weights in a
    channel."""

    group_size: int = Field(default=128, gt=0)
    """Weights in a group; must divide the inputs of every layer."""

    activations: Literal["none", "dynamic", "static"] = "none"
    """What layers are given: as it is, rounded to 8 bits by each token's largest feature, or
    rounded by one scale for each layer, which is found on calibration text."""

    observer: Literal["min-max", "ema"] = "min-max"
    """How a static scale is found: the largest number of all sequences, or an exponential moving
    average of each sequence's largest, which forgets single outliers."""

    ema_decay: float = Field(default=0.9, gt=0, lt=1)
    """How much of the average stays at each sequence."""

    skip_modules: tuple[str, ...] = ()
    """Linear layers to leave as they are, by name or part of one, beside the output head."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What everything else is kept in; auto: as the source has it."""

    def contradictions(self) -> Iterator[Fault]:
        if self.granularity != "group":
            why = f"with granularity={self.granularity}"
            yield from without_effect(self, ("group_size",), why, "set granularity=group")
        if self.activations != "static":
            why = f"with activations={self.activations}"
            yield from without_effect(
                self, ("observer", "ema_decay"), why, "set activations=static"
            )
        elif self.observer != "ema":
            yield from without_effect(self, ("ema_decay",), "with min-max", "set observer=ema")


def method(name: str) -> Method:
    return Method(
        name=name,
        options=Int8Options,
        check=_check,
        predict_bytes=_predict_bytes,
        make=_make,
        calibration=_calibration,
    )


def _calibration(options: Int8Options) -> CalibrationNeed:
    return "required" if options.activations == "static" else "none"


def _check(source: Source, options: Int8Options) -> None:
    require_quantizable(source, options.skip_modules, "int8")
    if options.granularity != "group":
        return
    inputs = {
        name: shape_of(source.skeleton.model.get_submodule(name))[1]
        for name in quantized_layers(source.skeleton, options.skip_modules)
    }
    odd = [name for name, count in inputs.items() if count % options.group_size]
    if odd:
        common = math.gcd(*inputs.values())
        raise ModelError(
            f"group_size={options.group_size} does not divide the {inputs[odd[0]]} inputs of "
            f"{odd[0]}{f' and {len(odd) - 1} more layers' if len(odd) > 1 else ''}; a divisor of "
            f"{common} suits every layer."
        )


def _predict_bytes(source: Source, options: Int8Options) -> int:
    names = quantized_layers(source.skeleton, options.skip_modules)
    shapes = [shape_of(source.skeleton.model.get_submodule(name)) for name in names]
    integers = sum(rows * columns for rows, columns in shapes)
    scales = {
        "tensor": len(shapes),
        "channel": sum(rows for rows, _ in shapes),
        "group": sum(rows * (columns // options.group_size) for rows, columns in shapes),
    }[options.granularity]
    rest = (source.num_parameters - integers) * kept_dtype(source, options.dtype).itemsize
    return integers + 4 * scales + rest + _LAYER_BYTES * len(names)


def _make(
    source: Source,
    options: Int8Options,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    from qlora_kit.quantize.int8 import Int8Config, Int8Linear

    names = quantized_layers(source.skeleton, options.skip_modules)
    ranges = {} if calibration is None else _ranges(source, options, calibration, names, reporter)
    layers = Layers()

    def load() -> PreTrainedModel:
        with reporter.progress("quantizing to int8", len(names)) as progress:
            config = Int8Config(
                granularity=options.granularity,
                group_size=options.group_size,
                activations="none" if ranges else options.activations,
                skip_modules=skipped_names(source.skeleton, options.skip_modules),
                on_layer=layers.watch(progress),
            )
            model = load_source(source, kept_dtype(source, options.dtype), config)
        for name, scale in ranges.items():
            module = model.get_submodule(name)
            assert isinstance(module, Int8Linear)
            module.use_static(scale)
        model.config.quantization_config.activations = options.activations
        return model

    save_checked(load, source, draft)
    findings = layers.findings()
    if ranges:
        findings["input_scales"] = {name: float(scale) for name, scale in ranges.items()}
    return Made(
        findings=findings,
        notes=(*layers.notes(), "it is loaded after `import qlora_kit.quantize.int8`"),
    )


def _ranges(
    source: Source,
    options: Int8Options,
    calibration: Calibration,
    names: list[str],
    reporter: Reporter,
) -> dict[str, torch.Tensor]:
    """The scale of what each layer is given, by the source as it stands."""
    from qlora_kit.quantize.int8.numbers import scale_of
    from qlora_kit.quantize.int8.observe import LargestSeen, observe

    model = load_source(source, computing_dtype(source))
    seen = LargestSeen(options.ema_decay if options.observer == "ema" else 0.0)
    observe(model, names, calibration.sequences, seen, reporter)
    del model
    gc.collect()
    unseen = [name for name in names if name not in seen.largest]
    if unseen:
        raise ModelError(
            f"{unseen[0]} was given nothing by any calibration text, so there is no scale for it; "
            f"leave it out with skip_modules=[{unseen[0]}]."
        )
    return {name: scale_of(torch.tensor(largest)) for name, largest in seen.largest.items()}
