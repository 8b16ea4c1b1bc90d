"""What a run can be exported to, by name. Light: `check` reads a recipe's targets with it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_kit.errors import ModelError
from qlora_kit.extras import require_extra
from qlora_kit.quantize.methods import METHODS, entry_of

if TYPE_CHECKING:
    from qlora_kit.export.trained import BaseKind

MergeBase = Literal["auto", "dequantized", "original"]
Maker = Literal["adapter", "merged", "method", "lora-gguf", "ollama"]

ADAPTER_FOR_VLLM = "adapter:vllm"
DEFAULT_GGUF = "Q8_0"
"""Of a target that names no type: it keeps what was trained, whichever base is merged into."""

_OWN = {
    "adapter": "the adapter, with its card; adapter:vllm refuses what vLLM cannot load",
    "merged": "adapter and base in one, as `merge` makes it",
    "lora-gguf": "the adapter as GGUF beside its base (lora-gguf:TYPE) for llama.cpp",
    "ollama": "a GGUF file (ollama:TYPE) and a Modelfile with the template that was trained",
}
_GGUF_FAMILIES = ("gguf", "lora-gguf", "ollama")
# Round weights that were rounded to 4 bits before once more, on another grid.
_FEW_BITS = ("nf4", "fp4", "gptq", "awq")


@dataclass(frozen=True)
class Target:
    """One thing to export to."""

    family: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.family}:{self.variant}" if self.variant else self.family

    @property
    def folder_name(self) -> str:
        return self.name.replace(":", "-")

    @property
    def maker(self) -> Maker:
        own: dict[str, Maker] = {
            "adapter": "adapter",
            "merged": "merged",
            "lora-gguf": "lora-gguf",
            "ollama": "ollama",
        }
        return own.get(self.family, "method")

    @property
    def method(self) -> str | None:
        """The way of quantizing that it is made by; None where nothing is quantized."""
        if self.family in ("adapter", "merged"):
            return None
        return f"gguf:{self.variant}" if self.family in _GGUF_FAMILIES else self.name

    @property
    def is_of_merge(self) -> bool:
        return self.family not in ("adapter", "lora-gguf")

    @property
    def wants_original(self) -> bool:
        """Whether it has to be made from the merge into the original weights: where few bits are
        left, a second rounding costs far more than the first one did.
        """
        return self.is_of_merge and self.has_few_bits

    @property
    def has_few_bits(self) -> bool:
        """Whether weights are left with four bits or so."""
        if self.family in _GGUF_FAMILIES:
            from qlora_kit.quantize.gguf.types import gguf_type

            return gguf_type(self.variant).has_few_bits
        return self.family in _FEW_BITS

    @property
    def takes_base(self) -> bool:
        """Whether there is a choice of base weights: to be merged into, or to stand beside."""
        return self.is_of_merge or self.maker == "lora-gguf"

    @property
    def is_made_of_both(self) -> bool:
        """Whether it is cheap enough to be made of either merge, so that a measurement decides."""
        return self.wants_original and self.family in _GGUF_FAMILIES

    def base_of(self, available: tuple[BaseKind, ...], asked: MergeBase) -> MergeBase:
        """`original`, `dequantized`, or `auto` where either serves.

        An adapter stands beside the weights that it was trained on, unless few bits are left of
        them: then beside the original ones, which are rounded once.
        """
        if asked == "auto" and not self.is_of_merge:
            preferred: BaseKind = "original" if self.has_few_bits else "dequantized"
            return preferred if preferred in available else available[0]
        if asked != "auto" or not self.wants_original or "original" not in available:
            return asked
        return "original"


def known_targets() -> dict[str, str]:
    """Every target with what it is."""
    methods = {
        f"{name}[:{entry.variant}]" if entry.variant else name: entry.summary
        for name, entry in METHODS.items()
    }
    return {**_OWN, **methods}


def parse_target(name: str) -> Target:
    """`gguf:Q4_K_M` and the like; a type that is not named is Q8_0.

    Raises:
        ModelError: there is no such target; says which there are.
    """
    family, colon, variant = name.partition(":")
    if family not in _OWN and family not in METHODS:
        names = [*_OWN, *METHODS]
        near = difflib.get_close_matches(family.lower(), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise ModelError(f"there is nothing called {name} to export to; {hint}")
    if colon and not variant:
        raise ModelError(f"{name} names nothing behind its colon; write {family}.")
    if family in _GGUF_FAMILIES:
        from qlora_kit.quantize.gguf.types import gguf_type

        return Target(family, gguf_type(variant or DEFAULT_GGUF).name)
    if family == "adapter" and variant not in ("", "vllm"):
        raise ModelError(f"there is adapter and {ADAPTER_FOR_VLLM}, and no {name}.")
    if family == "merged" and variant:
        raise ModelError(f"merged has no variants, got {name}.")
    if family in METHODS:
        entry = entry_of(name)
        choices = entry.variant.split("|")
        if variant and variant not in choices:
            known = [family, *(f"{family}:{one}" for one in choices)]
            raise ModelError(
                f"there is no {name}; there are {', '.join(known[:-1])} and {known[-1]}."
            )
    return Target(family, variant)


def require_installed(target: Target) -> None:
    """
    Raises:
        HardwareError: what makes it is not installed; names the command.
        ModelError: the checkout of llama.cpp that the environment names is none.
    """
    if target.method is None:
        return
    entry = METHODS[target.method.partition(":")[0]]
    if entry.extra:
        require_extra(entry.extra, f"--to {target.name}")
    if target.family in _GGUF_FAMILIES:
        from qlora_kit.quantize.gguf.scripts import checkout_for_all

        checkout_for_all()
