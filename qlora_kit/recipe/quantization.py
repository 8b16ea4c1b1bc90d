"""`quantization:` in how many bits the frozen base is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec


class QuantizationSpec(Spec):
    """Precision of the frozen base. 4-bit NF4 with double quantization unless said otherwise."""

    load_in_4bit: bool = True
    """Keep linear layers in 4 bits (QLoRA). Off, and 8-bit off: a 16- or 32-bit base."""

    load_in_8bit: bool = False
    """Keep linear layers in 8 bits, LLM.int8(). Turns 4-bit off unless that is set as well."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type. NF4 has the lower error on normally distributed weights."""

    double_quant: bool = True
    """Quantize the 4-bit scales too: 4.13 instead of 4.50 bits per parameter."""

    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What products are computed in. `auto` probes the hardware: bfloat16 where it is native,
    else float16 with a scaler on a GPU, else float32."""

    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """dtype that 4-bit weights are packed in; FSDP can shard only a floating one."""

    skip_modules: tuple[str, ...] = ()
    """Linear modules to leave unquantized, by name or part of one; added to the library's own
    list (the output head), never replacing it."""

    int8_threshold: float = Field(default=6.0, ge=0)
    """LLM.int8(): activations above this magnitude are multiplied in 16 bits."""

    @property
    def num_bits(self) -> int:
        """Bits a quantized weight is kept in; 16 stands for an unquantized base."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    def contradictions(self) -> Iterator[Fault]:
        if self.load_in_4bit and self.load_in_8bit:
            yield Fault(
                "load_in_8bit", "load_in_4bit is on as well", "choose one of them"
            )
        if self.num_bits == 16 and self.skip_modules:
            yield Fault(
                "skip_modules", "nothing is quantized", "remove it or turn 4-bit on"
            )
        changed = self.model_fields_set
        if self.load_in_8bit:
            for name in ("quant_type", "double_quant", "quant_storage"):
                if name in changed and getattr(self, name) != _DEFAULTS[name]:
                    yield Fault(
                        name, "only 4-bit bases have it, this one is 8-bit", "remove it"
                    )
        elif (
            "int8_threshold" in changed
            and self.int8_threshold != _DEFAULTS["int8_threshold"]
        ):
            yield Fault(
                "int8_threshold", "only 8-bit bases have it", "set load_in_8bit: true"
            )


_DEFAULTS = {
    name: field.default for name, field in QuantizationSpec.model_fields.items()
}
