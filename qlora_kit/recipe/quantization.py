"""`quantization:` in how many bits the frozen base is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec, without_effect

Name = Annotated[str, Field(min_length=1)]
Bits = Literal[4, 8, 16]


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
    """What products are computed in. `auto` follows train.precision; is that `auto` too, the
    hardware is probed: bfloat16 where it is native, else float16 with a scaler on a GPU, else
    float32."""

    upcast_norms: Literal["auto"] | bool = "auto"
    """Keep norms in float32 where the rest computes in 16 bits, by which what passes from layer
    to layer of a 4-bit base is in float32 too and takes about twice the memory. `auto`: with
    float16, whose range is narrow; in bfloat16, as most models were trained, norms stay so."""

    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """dtype that 4-bit weights are packed in; FSDP can shard only a floating one."""

    skip_modules: tuple[str, ...] = ()
    """Linear modules to leave unquantized, by name or part of one; added to the library's own
    list (the output head), never replacing it."""

    int8_threshold: float = Field(default=6.0, ge=0)
    """LLM.int8(): activations above this magnitude are multiplied in 16 bits."""

    overrides: dict[Name, Bits] = Field(default_factory=dict)
    """Bits (4, 8 or 16) of the linear layers that a pattern names, where they differ from the
    rest: `{layers.0.mlp.down_proj: 16, v_proj: 8}`. A pattern is any whole parts of a layer's
    name; `*` stands for anything. Of several that match, the one with most letters holds."""

    @property
    def num_bits(self) -> Bits:
        """Bits that a linear layer is kept in where no override names it; 16 stands for an
        unquantized base."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16

    @property
    def all_bits(self) -> frozenset[Bits]:
        """Every number of bits that some layer may be kept in."""
        return frozenset({self.num_bits, *self.overrides.values()})

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is kept in fewer than 16 bits."""
        return min(self.all_bits) < 16

    def contradictions(self) -> Iterator[Fault]:
        if self.load_in_4bit and self.load_in_8bit:
            yield Fault("load_in_8bit", "load_in_4bit is on as well", "choose one of them")
        only_four = ("quant_type", "double_quant", "quant_storage")
        if not self.is_quantized:
            why = "on a base that is not quantized"
            yield from without_effect(self, ("skip_modules", *only_four), why, "remove it")
        elif 4 not in self.all_bits:
            why = "on an 8-bit base" if self.num_bits == 8 else "where no layer is kept in 4 bits"
            yield from without_effect(self, only_four, why, "remove it")
        if self.is_quantized and self.num_bits == 16:
            why = "where only what overrides names is quantized"
            yield from without_effect(self, ("skip_modules",), why, "remove it")
        if 8 not in self.all_bits:
            hint = "set load_in_8bit: true, or remove it"
            yield from without_effect(self, ("int8_threshold",), "on a base not in 8 bits", hint)
        yield from self._override_faults()

    def _override_faults(self) -> Iterator[Fault]:
        for pattern in self.overrides:
            if not pattern.strip("*."):
                hint = "set load_in_4bit or load_in_8bit instead"
                yield Fault(f"overrides.{pattern}", "names every layer, and not some", hint)
        if self.overrides and all(bits == self.num_bits for bits in self.overrides.values()):
            message = f"every layer it names has {self.num_bits} bits without it"
            yield Fault("overrides", message, "remove it")
