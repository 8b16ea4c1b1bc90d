"""Whether this machine can read weights in blocks of the size that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.errors import ModelError
from qlora_kit.model.blocks import reads_right
from qlora_kit.quantize.layers import quantized_layers, shape_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qlora_kit.quantize.method import Source

_BLOCK_SIZES = (4096, 2048, 1024, 512, 256, 128, 64, 32)


def require_readable_blocks(
    source: Source, skip_modules: Sequence[str], quant_type: str, block_size: int
) -> None:
    """Raises ModelError where this machine would read a layer's weights other than they are."""
    inputs: dict[int, str] = {}
    for name in quantized_layers(source.skeleton, skip_modules):
        num_in = shape_of(source.skeleton.model.get_submodule(name))[1]
        inputs.setdefault(num_in, name)
    for num_in, name in inputs.items():
        if num_in % block_size and not reads_right(
            num_in, quant_type, block_size, source.hardware.device
        ):
            fitting = next(
                (size for size in _BLOCK_SIZES if all(not count % size for count in inputs)), None
            )
            leaf = name.rpartition(".")[2]
            do = f"take block_size={fitting}" if fitting else f"set skip_modules=[{leaf}]"
            raise ModelError(
                f"{name} has {num_in} inputs, which is no whole number of blocks of {block_size}, "
                "and bitsandbytes reads such weights wrongly on this processor (it mixes up their "
                f"scales); {do}."
            )
