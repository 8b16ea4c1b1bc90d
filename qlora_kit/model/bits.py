"""In how many bits each linear layer of a base is kept."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import is_linear, name_matches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.recipe import QuantizationSpec


def module_bits(skeleton: Skeleton, quantization: QuantizationSpec) -> dict[str, int]:
    """4, 8 or 16 for every linear module by its full name, the head included.

    An override holds against `skip_modules`, and the longer of two overrides against the shorter.

    Raises:
        ModelError: a pattern matches nothing, or decides nothing; two of a length contradict
            each other; or the head would be quantized.
    """
    model = skeleton.model
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    kept = (*quantization.skip_modules, *(model._keep_in_fp32_modules or ()))
    bits: dict[str, int] = {}
    deciding: set[str] = set()
    for name in linear:
        pattern = _pattern_for(name, quantization.overrides)
        is_head = name not in skeleton.linear_modules
        if pattern is not None:
            deciding.add(pattern)
            bits[name] = quantization.overrides[pattern]
            if is_head and bits[name] < 16:
                raise ModelError(
                    f"quantization.overrides: {pattern} matches {name}, which is the head or tied "
                    "to it and stays in 16 bits; name layers inside the blocks."
                )
        elif is_head or name_matches(name, kept):
            bits[name] = 16
        else:
            bits[name] = quantization.num_bits
    _require_all_decide(quantization.overrides, deciding, linear)
    return bits


def quantized_bits(skeleton: Skeleton, quantization: QuantizationSpec) -> dict[str, int]:
    """The same of those modules alone that are kept in 4 or 8 bits."""
    if not quantization.is_quantized:
        return {}
    found = module_bits(skeleton, quantization)
    return {name: bits for name, bits in found.items() if bits < 16}


def override_matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is some whole parts of a dotted name, `*` standing for anything."""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _pattern_for(name: str, overrides: Mapping[str, int]) -> str | None:
    """The pattern that decides over one module; None where none names it."""
    matching = [pattern for pattern in overrides if override_matches(name, pattern)]
    if not matching:
        return None
    longest = max(map(_num_letters, matching))
    first, *others = [one for one in matching if _num_letters(one) == longest]
    for other in others:
        if overrides[other] != overrides[first]:
            raise ModelError(
                f"quantization.overrides: {first} gives {name} {overrides[first]} bits, and "
                f"{other}, which is as long, {overrides[other]}; name more of one of them."
            )
    return first


def _num_letters(pattern: str) -> int:
    return len(pattern) - pattern.count("*")


def _require_all_decide(
    overrides: Mapping[str, int], deciding: set[str], linear: list[str]
) -> None:
    for pattern in overrides:
        if pattern in deciding:
            continue
        matched = [name for name in linear if override_matches(name, pattern)]
        if not matched:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(
                f"quantization.overrides: {pattern} matches no linear layer; they are called "
                f"{linear[0]} and so on, and their kinds are {', '.join(kinds)}."
            )
        stronger = _pattern_for(matched[0], overrides)
        if stronger is None or overrides[stronger] != overrides[pattern]:
            raise ModelError(
                f"quantization.overrides: {pattern} decides nothing: longer patterns (such as "
                f"{stronger}) match all that it matches; remove it."
            )
