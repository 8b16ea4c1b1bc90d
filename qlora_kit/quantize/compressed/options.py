"""What gptq and awq have in common: their options, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import nn

from qlora_kit.errors import Fault, ModelError
from qlora_kit.extras import require_extra
from qlora_kit.quantize.layers import quantized_layers, require_quantizable, shape_of
from qlora_kit.quantize.load import kept_dtype
from qlora_kit.quantize.method import MethodOptions, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

_FILE_BYTES = 2**20


class CompressedOptions(MethodOptions):
    """Options of gptq and awq."""

    bits: int = Field(default=4, ge=2, le=8)
    """Of a weight. vLLM computes with 4 and 8; transformers unpacks any."""

    group_size: int | None = Field(default=64, ge=8)
    """Weights of a row that share a scale, which must divide every row; null for the whole row."""

    skip_modules: tuple[str, ...] = Field(default=())
    """Linear layers to leave as they are, by name or part of one, beside the output head."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What scales and everything else are kept in; auto: as the source has it."""

    def contradictions(self) -> Iterator[Fault]:
        if not all(self.skip_modules):
            yield Fault("skip_modules", "must not hold empty text", "remove it")


def require_compressible(name: str, source: Source, options: CompressedOptions) -> None:
    """
    Raises:
        HardwareError: llmcompressor is not installed.
        ModelError: a layer is none that it takes, or rows are not divided by the group size.
    """
    require_extra("gptq", f"--method {name}")
    require_quantizable(source, options.skip_modules, name)
    model = source.skeleton.model
    names = quantized_layers(source.skeleton, options.skip_modules)
    turned = [one for one in names if not isinstance(model.get_submodule(one), nn.Linear)]
    if turned:
        layer = type(model.get_submodule(turned[0])).__name__
        raise ModelError(
            f"{source.name} keeps {len(turned)} linear layers as {layer} ({turned[0]} …), which "
            f"llmcompressor does not know; int8, nf4 or gguf:TYPE take such a model."
        )
    _require_whole_groups(source, names, options.group_size)


def _require_whole_groups(source: Source, names: Sequence[str], group_size: int | None) -> None:
    if group_size is None:
        return
    model = source.skeleton.model
    columns = {name: shape_of(model.get_submodule(name))[1] for name in names}
    odd = [name for name in names if columns[name] % group_size]
    if not odd:
        return
    common = math.gcd(*columns.values())
    fitting = [size for size in (128, 64, 32, 16, 8) if common % size == 0]
    instead = f"group_size={fitting[0]} divides all of them" if fitting else "take group_size=null"
    raise ModelError(
        f"group_size={group_size} does not divide the rows of {len(odd)} layers of {source.name} "
        f"({odd[0]} has {columns[odd[0]]} inputs); {instead}, or leave them out with skip_modules."
    )


def predicted_bytes(source: Source, options: CompressedOptions) -> int:
    """Packed weights, scales, zero points, and the rest as it is kept."""
    model = source.skeleton.model
    kept = kept_dtype(source, options.dtype).itemsize
    num_quantized = packed = 0
    for name in quantized_layers(source.skeleton, options.skip_modules):
        rows, columns = shape_of(model.get_submodule(name))
        groups = 1 if options.group_size is None else columns // options.group_size
        num_quantized += rows * columns
        packed += 4 * rows * math.ceil(columns * options.bits / 32)
        packed += rows * groups * kept + 4 * groups * math.ceil(rows * options.bits / 32)
    return packed + kept * (source.num_parameters - num_quantized) + _FILE_BYTES
