"""The file types of GGUF that a model can be quantized to."""

from __future__ import annotations

import difflib
import string
from dataclasses import dataclass
from itertools import takewhile

from qlora_kit.errors import ModelError

_PREFIXES = ("ALL_", "MOSTLY_")

# What the converter writes itself; everything else takes llama.cpp's quantizer.
_CONVERTED = ("F32", "F16", "BF16", "Q8_0")

# llama.cpp refuses these without an importance matrix (`tensor_requires_imatrix`).
_NEED_IMPORTANCE = (
    "Q2_K_S",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
)

# For weights that are ternary, binary or in these formats already: other weights are destroyed.
_FOR_OTHER_WEIGHTS = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4_MOE", "NVFP4")

# Most weights take 4.5 bits or fewer: made from a model that was quantized before, the two
# errors add up.
_FEW_BITS = ("Q2", "Q3", "Q4", "IQ1", "IQ2", "IQ3", "IQ4")


@dataclass(frozen=True)
class GgufType:
    """One file type, as llama.cpp numbers and names it."""

    name: str
    number: int

    @property
    def is_converted(self) -> bool:
        """Whether the converter writes it without the quantizer."""
        return self.name in _CONVERTED

    @property
    def needs_importance(self) -> bool:
        """Whether it takes calibration text."""
        return self.name in _NEED_IMPORTANCE

    @property
    def has_few_bits(self) -> bool:
        """Whether most weights take four bits or so."""
        return self.name.startswith(_FEW_BITS)


def gguf_types() -> dict[str, GgufType]:
    """The types that a model can be quantized to, by name, as the gguf library lists them."""
    return {
        name: GgufType(name, number)
        for name, number in _listed().items()
        if name not in _FOR_OTHER_WEIGHTS
    }


def gguf_type(name: str) -> GgufType:
    """The type of that name, in capitals or not.

    Raises:
        ModelError: there is none, or it cannot be made here; says why, and which there are.
    """
    types = gguf_types()
    wanted = name.upper()
    if wanted in types:
        return types[wanted]
    if wanted in _FOR_OTHER_WEIGHTS:
        raise ModelError(
            f"{wanted} is for models whose weights were trained to that form, and would destroy "
            "others; take Q4_K_M, or Q2_K for the smallest."
        )
    near_names = difflib.get_close_matches(wanted, types, n=1)
    known = ", ".join(sorted(types, key=_by_bits))
    hint = f"did you mean {near_names[0]}? There are" if near_names else "there are"
    raise ModelError(f"there is no GGUF type {name}; {hint} {known}.")


def _by_bits(name: str) -> tuple[int, str]:
    """The first number in a type's name is its bits."""
    digits = takewhile(str.isdigit, name.lstrip(string.ascii_uppercase))
    return int("".join(digits)), name


def _listed() -> dict[str, int]:
    """Every file type of the library's enumeration, without its prefix."""
    from gguf import LlamaFileType

    return {
        one.name.removeprefix(prefix): int(one.value)
        for one in LlamaFileType
        for prefix in _PREFIXES
        if one.name.startswith(prefix)
    }
