"""`quantization:` in how many bits the frozen base is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec, without_effect


class QuantizationSpec(Spec):
    """Precision of the frozen base. 4-bit NF4 with double quantization unless said otherwise."""

    load_in_8bit: bool = False
    """Keep linear layers in 8 bits, LLM.int8(), instead of in 4."""

    load_in_4bit: bool = Field(
        default_factory=lambda given: not given.get("load_in_8bit", False),
        json_schema_extra={"default": True},
    )
    """Keep linear layers in 4 bits (QLoRA); the default unless load_in_8bit is on. With both off,
    a 16- or 32-bit base."""

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
            yield Fault("load_in_8bit", "load_in_4bit is on as well", "choose one of them")
        only_four = ("quant_type", "double_quant", "quant_storage")
        if self.num_bits == 8:
            yield from without_effect(self, only_four, "on an 8-bit base", "remove it")
        if self.num_bits == 16:
            why = "on a base that is not quantized"
            yield from without_effect(self, ("skip_modules", *only_four), why, "remove it")
        if self.num_bits != 8:
            hint = "set load_in_8bit: true, or remove it"
            yield from without_effect(self, ("int8_threshold",), "on a base not in 8 bits", hint)
