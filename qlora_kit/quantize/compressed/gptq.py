"""`gptq`: rounding errors of a weight are made up for by those after it, on calibration text.

Frantar et al., https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qlora_kit.quantize.compressed.options import (
    CompressedOptions,
    predicted_bytes,
    require_compressible,
)
from qlora_kit.quantize.method import Calibration, Made, Method, Source

if TYPE_CHECKING:
    from qlora_kit.report.reporter import Reporter


class GptqOptions(CompressedOptions):
    """Options of gptq."""

    symmetric: bool = True
    """Round to -8 … 7 times the scale; otherwise a zero point is kept beside each scale."""

    act_order: bool = True
    """Round the columns with the largest activations first. Costs nothing where it is used."""

    dampening: float = Field(default=0.01, gt=0, lt=1)
    """Added to the diagonal of the inputs' second moments, as a share of its mean."""


def method(name: str) -> Method:
    return Method(
        name=name,
        options=GptqOptions,
        check=_check,
        predict_bytes=predicted_bytes,
        make=_make,
        try_small=_try_small,
        calibration=lambda options: "required",
    )


def _check(source: Source, options: GptqOptions) -> None:
    require_compressible("gptq", source, options)


def _try_small(source: Source, options: GptqOptions) -> str:
    from qlora_kit.quantize.compressed.make import try_small

    return try_small(_modifiers, source, options, "gptq")


def _make(
    source: Source,
    options: GptqOptions,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    assert calibration is not None
    from qlora_kit.quantize.compressed.make import make_compressed

    modifiers = _modifiers(source, options)
    return make_compressed(modifiers, source, options, calibration, draft, reporter, "gptq")


def _modifiers(source: Source, options: GptqOptions) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    from qlora_kit.quantize.compressed.make import layer_groups

    return [
        GPTQModifier(
            **layer_groups(source, options, options.symmetric),
            actorder="weight" if options.act_order else None,
            dampening_frac=options.dampening,
        )
    ]
