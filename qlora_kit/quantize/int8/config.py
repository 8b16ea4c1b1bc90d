"""What config.json says of a model in this format, under `quantization_config`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_kit.quantize.errors_by_layer import OnLayer
from qlora_kit.quantize.int8.numbers import Granularity

METHOD = "qlora-kit-int8"
Activations = Literal["none", "dynamic", "static"]


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """Weights in 8-bit integers; activations as they are, or in 8-bit integers as well.

    Args:
        granularity: what shares a scale: the whole `tensor`, an output `channel`, or a `group` of
            `group_size` weights in a channel.
        activations: `none` multiplies dequantized weights; `dynamic` rounds each token to 8 bits
            by its own largest feature; `static` rounds by a scale that calibration found.
        skip_modules: linear layers left as they are, by name, start or end of a name. None stands
            for the head and what is tied to it.
        on_layer: called after each layer that is quantized; not saved.
    """

    def __init__(
        self,
        granularity: Granularity = "channel",
        group_size: int = 128,
        activations: Activations = "none",
        skip_modules: list[str] | None = None,
        on_layer: OnLayer | None = None,
        **ignored: Any,
    ):
        self.quant_method: Any = METHOD
        for name, value, known in (
            ("granularity", granularity, get_args(Granularity)),
            ("activations", activations, get_args(Activations)),
        ):
            if value not in known:
                raise ValueError(f"{METHOD}: {name} must be one of {known}, got {value!r}")
        self.granularity = granularity
        self.group_size = group_size
        self.activations = activations
        self.skip_modules = skip_modules
        self.on_layer = on_layer

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "on_layer"}
