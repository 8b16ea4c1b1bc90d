"""`nf4` and `fp4`: 4 bits by bitsandbytes, a checkpoint that stock transformers loads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.model.base import bitsandbytes_config
from qlora_kit.quantize.blocks import require_readable_blocks
from qlora_kit.quantize.errors_by_layer import Layers
from qlora_kit.quantize.layers import quantized_layers, require_quantizable, shape_of
from qlora_kit.quantize.load import kept_dtype, load_source, save_checked
from qlora_kit.quantize.method import Calibration, Made, Method, MethodOptions, Source
from qlora_kit.recipe import QuantizationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.report.reporter import Reporter

# bitsandbytes quantizes the scales of this many blocks together.
_NESTED_BLOCK = 256
_QUANT_STATE_BYTES = 2048


class FourBitOptions(MethodOptions):
    """Options of nf4 and fp4."""

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Weights that share a scale. Smaller blocks are more exact, and take more room."""

    double_quant: bool = True
    """Quantize the scales too: 4.13 instead of 4.50 bits per weight in blocks of 64."""

    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """dtype that 4-bit weights are packed in; FSDP can shard only a floating one."""

    skip_modules: tuple[str, ...] = Field(default=())
    """Linear layers to leave as they are, by name or part of one, beside the output head."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What everything else is kept in, and 4-bit layers compute in; auto: as the source has it."""

    def contradictions(self) -> Iterator[Fault]:
        if not all(self.skip_modules):
            yield Fault("skip_modules", "must not hold empty text", "remove it")


def method(name: str) -> Method:
    kind: Literal["nf4", "fp4"] = "nf4" if name == "nf4" else "fp4"
    return Method(
        name=kind,
        options=FourBitOptions,
        check=partial(_check, kind),
        predict_bytes=_predict_bytes,
        make=partial(_make, kind),
    )


def _check(name: str, source: Source, options: FourBitOptions) -> None:
    require_quantizable(source, options.skip_modules, name)
    require_readable_blocks(source, options.skip_modules, name, options.block_size)


def _predict_bytes(source: Source, options: FourBitOptions) -> int:
    """Packed weights, their scales, and the rest as it is kept."""
    model = source.skeleton.model
    packed = scales = num_quantized = 0
    names = quantized_layers(source.skeleton, options.skip_modules)
    for name in names:
        count = math.prod(shape_of(model.get_submodule(name)))
        num_quantized += count
        packed += -(-count // 2)
        scales += -(-count // options.block_size) * (1 if options.double_quant else 4)
    rest = source.num_parameters - num_quantized
    nested = 4 * scales // _NESTED_BLOCK if options.double_quant else 0
    kept = kept_dtype(source, options.dtype).itemsize * rest
    return packed + scales + nested + kept + _QUANT_STATE_BYTES * len(names)


def _make(
    name: Literal["nf4", "fp4"],
    source: Source,
    options: FourBitOptions,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    assert calibration is None
    from qlora_kit.quantize.watched import WatchedConfig

    dtype = kept_dtype(source, options.dtype)
    spec = QuantizationSpec(
        quant_type=name,
        double_quant=options.double_quant,
        quant_storage=options.quant_storage,
        skip_modules=options.skip_modules,
    )
    stock = bitsandbytes_config(spec, source.skeleton, dtype)
    assert stock is not None
    names = quantized_layers(source.skeleton, options.skip_modules)
    layers = Layers()

    def load() -> PreTrainedModel:
        with reporter.progress(f"quantizing to {name}", len(names)) as progress:
            config = WatchedConfig(stock, layers.watch(progress), options.block_size)
            return load_source(source, dtype, config)

    save_checked(load, source, draft)
    return Made(findings=layers.findings(), notes=layers.notes())
