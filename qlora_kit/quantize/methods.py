"""The methods by name. Their modules, which import what is heavy, are imported when asked for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from qlora_kit.errors import ModelError
from qlora_kit.extras import distributions, require_extra
from qlora_kit.versions import package_versions

if TYPE_CHECKING:
    from qlora_kit.quantize.method import Method


@dataclass(frozen=True)
class Entry:
    """Where a method is found, and what to say of it before it is imported."""

    module: str
    """It has a function `method(name: str) -> Method`, given the whole name, variant included."""
    summary: str
    variant: str = ""
    """How the part behind the colon is called, where there is one: `TYPE`."""
    example: str = ""
    """A variant, where one has to be named. All of them have the same options."""
    extra: str = ""
    """The kit's extra that brings what an installation may lack."""


METHODS: dict[str, Entry] = {
    "nf4": Entry("qlora_kit.quantize.four_bit", "4-bit NormalFloat, by bitsandbytes"),
    "fp4": Entry("qlora_kit.quantize.four_bit", "4-bit floating point, by bitsandbytes"),
    "llm-int8": Entry(
        "qlora_kit.quantize.llm_int8",
        "8 bits, activations too, with outlier features in 16, by bitsandbytes",
    ),
    "int8": Entry(
        "qlora_kit.quantize.int8.make",
        "8-bit integers, activations too if wanted; the kit's own, for transformers",
    ),
    "gptq": Entry(
        "qlora_kit.quantize.compressed.gptq",
        "2 to 8 bits, errors compensated on calibration text, by llmcompressor",
        extra="gptq",
    ),
    "awq": Entry(
        "qlora_kit.quantize.compressed.awq",
        "2 to 8 bits, scaled by activations on calibration text, by llmcompressor",
        extra="gptq",
    ),
    "gguf": Entry(
        "qlora_kit.quantize.gguf.make",
        "a GGUF file for llama.cpp: gguf:Q4_K_M, gguf:Q8_0 …",
        variant="TYPE",
        example="Q4_K_M",
        extra="gguf",
    ),
    "onnx": Entry(
        "qlora_kit.quantize.onnx.make",
        "a graph for ONNX Runtime: onnx, onnx:int8-dynamic, onnx:int8-static",
        variant="int8-dynamic|int8-static",
        extra="onnx",
    ),
}


def known_methods() -> str:
    """Their names, for a message."""
    return ", ".join(
        f"{name}:{entry.variant}" if entry.example else name for name, entry in METHODS.items()
    )


def entry_of(name: str) -> Entry:
    """What is known of a method before its module is imported.

    Raises:
        ModelError: there is no such method; says which there are.
    """
    family, colon, variant = name.partition(":")
    if family not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {known_methods()}."
        raise ModelError(f"there is no method {name}; {hint}")
    entry = METHODS[family]
    if colon and not entry.variant:
        raise ModelError(f"{family} has no variants, got {name}; write --method {family}.")
    if entry.example and not variant:
        raise ModelError(f"{family} needs its {entry.variant}, as in {family}:{entry.example}.")
    if colon and not variant:
        raise ModelError(f"{name} names no variant; write {family}, or {family}:{entry.variant}.")
    return entry


def resolve_method(name: str) -> Method:
    """The method called `name`, such as `nf4` or `gguf:Q4_K_M`.

    Raises:
        ModelError: there is none.
        HardwareError: what it needs is not installed.
    """
    entry = entry_of(name)
    if entry.extra:
        require_extra(entry.extra, f"--method {name}")
    made: Method = import_module(entry.module).method(name)
    return made


def tools_of(name: str) -> dict[str, str | None]:
    """Versions of what makes it, beside the packages that every installation has."""
    extra = entry_of(name).extra
    return package_versions(distributions(extra)) if extra else {}


def any_of(name: str) -> Method:
    """The same, but of a family whose variant is not named, some one.

    Raises:
        ModelError, HardwareError: as `resolve_method`.
    """
    entry = METHODS.get(name)
    return resolve_method(f"{name}:{entry.example}" if entry and entry.example else name)
