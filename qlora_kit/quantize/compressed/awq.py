"""`awq`: channels that carry large activations are scaled up before their weights are rounded.

What comes before takes the inverse scale, so the model computes the same. Lin et al.,
https://arxiv.org/abs/2306.00978.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from qlora_kit.errors import ModelError
from qlora_kit.quantize.compressed.options import (
    CompressedOptions,
    predicted_bytes,
    require_compressible,
)
from qlora_kit.quantize.method import Calibration, Made, Method, Source

if TYPE_CHECKING:
    from qlora_kit.report.reporter import Reporter


class AwqOptions(CompressedOptions):
    """Options of awq."""

    symmetric: bool = False
    """Round to -8 … 7 times the scale; otherwise a zero point is kept beside each scale."""

    grid: int = Field(default=20, ge=1)
    """How many scales are tried for each group of layers; time grows with it."""


def method(name: str) -> Method:
    return Method(
        name=name,
        options=AwqOptions,
        check=_check,
        predict_bytes=predicted_bytes,
        make=_make,
        try_small=_try_small,
        calibration=lambda options: "required",
    )


def _check(source: Source, options: AwqOptions) -> None:
    """
    Raises:
        ModelError: also where llmcompressor does not know which layers feed which; it would take
            a Llama's, and scale what it should not.
    """
    require_compressible("awq", source, options)
    from llmcompressor.modifiers.transform.awq import (
        AWQ_DYNAMIC_MAPPING_REGISTRY,
        AWQ_MAPPING_REGISTRY,
    )

    known = {*AWQ_MAPPING_REGISTRY, *AWQ_DYNAMIC_MAPPING_REGISTRY}
    architecture = type(source.skeleton.model).__name__
    if architecture not in known:
        raise ModelError(
            f"llmcompressor does not know which layers of {architecture} feed which, so awq cannot "
            f"scale them ({source.name}); gptq takes any linear layer."
        )


def _try_small(source: Source, options: AwqOptions) -> str:
    from qlora_kit.quantize.compressed.make import try_small

    return try_small(_modifiers, source, options.model_copy(update={"grid": 1}), "awq")


def _make(
    source: Source,
    options: AwqOptions,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    assert calibration is not None
    from qlora_kit.quantize.compressed.make import make_compressed

    modifiers = _modifiers(source, options)
    return make_compressed(modifiers, source, options, calibration, draft, reporter, "awq")


def _modifiers(source: Source, options: AwqOptions) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    from qlora_kit.quantize.compressed.make import layer_groups
    from qlora_kit.quantize.compressed.unpinned import awq_modifier

    return [
        awq_modifier(n_grid=options.grid),
        QuantizationModifier(**layer_groups(source, options, options.symmetric)),
    ]
