"""`gguf:TYPE`: a model as one GGUF file, with its tokenizer's files beside it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.environment import available_cpus
from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.convert import Converter, open_converter
from qlora_kit.quantize.gguf.importance import (
    Importance,
    measure_importance,
    weight_of,
    write_importance,
)
from qlora_kit.quantize.gguf.quantizer import quantize_file
from qlora_kit.quantize.gguf.scripts import LlamaCpp, find_llama_cpp
from qlora_kit.quantize.gguf.types import GgufType, gguf_type
from qlora_kit.quantize.method import (
    Calibration,
    CalibrationNeed,
    Made,
    Method,
    MethodOptions,
    Source,
)

if TYPE_CHECKING:
    from qlora_kit.report.reporter import Reporter

# For the header, and for tensors that stay wider than the rest.
_SPARE_BYTES = 64 * 2**20
_GENERATION = "generation_config.json"
_CERTIFICATE = "certificate.json"


class GgufOptions(MethodOptions):
    """The options of `gguf:TYPE`."""

    llama_cpp: Path | None = None
    """A checkout of llama.cpp, whose scripts (and `llama-quantize`, where it was built) are used;
    unless given, the one that `QLORA_KIT_LLAMA_CPP` names, else the scripts that came with the
    pinned llama-cpp-python."""

    importance: bool = True
    """Where calibration text is named: weigh the errors of rounding by what the layers are given
    on it (llama.cpp's importance matrix)."""


def method(name: str) -> Method:
    """The method called `gguf:TYPE`. ModelError where there is no such type."""
    made = _GgufMethod(gguf_type(name.partition(":")[2]))
    return Method(
        name=f"gguf:{made.kind.name}",
        options=GgufOptions,
        check=made.check,
        predict_bytes=made.predict_bytes,
        make=made.make,
        calibration=made.calibration,
    )


@dataclass
class _GgufMethod:
    kind: GgufType
    converters: dict[Path, Converter] = field(default_factory=dict)
    """By the folder that they convert; found in `check`, used in `make`."""

    def calibration(self, options: GgufOptions) -> CalibrationNeed:
        if self.kind.is_converted or not options.importance:
            return "none"
        return "required" if self.kind.needs_importance else "optional"

    def check(self, source: Source, options: GgufOptions) -> None:
        if self.kind.needs_importance:
            _require_importance(self.kind, source, options)
        llama = find_llama_cpp(options.llama_cpp)
        self.converters[source.folder] = checked_converter(llama, source.folder, source.tokenizer)

    def predict_bytes(self, source: Source, options: GgufOptions) -> int:
        first = source.num_parameters * (4 if outtype_of(source.dtype) == "f32" else 2)
        return first + (0 if self.kind.is_converted else first) + _SPARE_BYTES

    def make(
        self,
        source: Source,
        options: GgufOptions,
        calibration: Calibration | None,
        draft: Path,
        reporter: Reporter,
    ) -> Made:
        warning = dequantized_warning(source.folder, self.kind)
        if warning is not None and not source.is_rounding_told:
            reporter.warn(warning)
        converter = self.converters.get(source.folder)
        if converter is None:
            self.check(source, options)
            converter = self.converters[source.folder]
        importance = None
        if calibration is not None:
            importance = measure_importance(source, calibration, reporter)
        target = draft / f"model-{self.kind.name}.gguf"
        quantized = make_gguf(converter, target, self.kind, outtype_of(source.dtype), importance)
        write_companions(source.folder, source.tokenizer, draft)
        return Made(
            open=target.name,
            findings=findings_of(converter.llama, target, self.kind, quantized),
            notes=tuple(_notes(quantized, self.kind, source.tokenizer)),
        )


def _require_importance(kind: GgufType, source: Source, options: GgufOptions) -> None:
    if not options.importance:
        raise ModelError(
            f"llama.cpp makes {kind.name} only with an importance matrix; leave importance=false "
            "away, or take Q2_K or IQ3_S."
        )
    unseen = source.skeleton.expert_parameters
    if unseen:
        raise ModelError(
            f"llama.cpp makes {kind.name} only where calibration text weighs every matrix, and "
            f"what each of several fused experts is given is not seen ({unseen[0]}); take Q2_K or "
            "IQ3_S."
        )


def checked_converter(llama: LlamaCpp, folder: Path, tokenizer: Any) -> Converter:
    """The converter for a model folder, once llama.cpp takes it and splits text as training did.

    Raises:
        ModelError: it does not; says why, or shows the first difference.
    """
    from qlora_kit.quantize.gguf.parity import require_parity

    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = Path(scratch) / "vocabulary.gguf"
        converter = open_converter(llama, folder, tokenizer, vocabulary)
        require_parity(tokenizer, folder, vocabulary)
    return converter


def outtype_of(dtype: Any) -> str:
    """The converter's type that loses nothing of weights stored in this torch dtype."""
    return {"torch.float16": "f16", "torch.bfloat16": "bf16"}.get(str(dtype), "f32")


@dataclass(frozen=True)
class Quantized:
    """How it went: numbers of tensors, each with how many there are; None where there is nothing
    to say.
    """

    fallbacks: tuple[int, int] | None = None
    """That took a neighbouring type because their rows do not fit the blocks of this one."""
    weighed: tuple[int, int] | None = None
    """Whose errors were weighed by calibration text."""


def make_gguf(
    converter: Converter,
    target: Path,
    kind: GgufType,
    outtype: str,
    importance: Importance | None = None,
) -> Quantized:
    """Convert, and quantize unless the converter can write the type itself.

    Args:
        outtype: what the file in between is written in, `outtype_of` the stored weights.
    """
    if kind.is_converted:
        converter.convert(target, kind.name.lower())
        return Quantized()
    between = target.with_name(f"{target.stem}.between.gguf")
    matrix = target.with_name(f"{target.stem}.importance.gguf")
    weighed = None
    try:
        converter.convert(between, outtype)
        if importance is not None:
            weighed = write_importance(importance, between, matrix)
        fallbacks = quantize_file(
            converter.llama,
            between,
            target,
            kind,
            available_cpus(),
            None if importance is None else matrix,
        )
    finally:
        between.unlink(missing_ok=True)
        matrix.unlink(missing_ok=True)
    return Quantized(fallbacks, weighed)


def write_companions(folder: Path, tokenizer: Any, draft: Path) -> None:
    """What llama.cpp does not need, and whoever measures the file does: tokenizer and stops."""
    tokenizer.save_pretrained(draft)
    if (folder / _GENERATION).is_file():
        shutil.copyfile(folder / _GENERATION, draft / _GENERATION)


def findings_of(
    llama: LlamaCpp, target: Path, kind: GgufType, quantized: Quantized
) -> Mapping[str, Any]:
    """What a certificate says of the file."""
    from qlora_kit.runtime.gguf_header import read_header

    header = read_header(target)
    return {
        "type": kind.name,
        "architecture": header.architecture,
        "parameters": dict(header.parameters),
        "bits_per_weight": 8 * header.weight_bytes / sum(header.parameters.values()),
        "tensors_of_another_type": quantized.fallbacks[0] if quantized.fallbacks else 0,
        "tensors_weighed_by_text": quantized.weighed[0] if quantized.weighed else 0,
        "llama_cpp": llama.origin,
    }


def _notes(quantized: Quantized, kind: GgufType, tokenizer: Any) -> Iterator[str]:
    from qlora_kit.quantize.gguf.parity import composes

    if quantized.weighed is not None:
        yield weight_of(quantized.weighed)
    if quantized.fallbacks is not None:
        yield fallback_note(quantized.fallbacks, kind)
    if composes(tokenizer):
        yield (
            "this tokenizer composes characters (Unicode NFC) and llama.cpp does not: compose "
            "texts before you give them to it; most are composed already"
        )


def fallback_note(fallbacks: tuple[int, int], kind: GgufType) -> str:
    return (
        f"{fallbacks[0]} of {fallbacks[1]} tensors have rows that are no multiple of the 256 "
        f"weights of a {kind.name} block; llama.cpp took the next larger type with blocks of 32 "
        "for them, so the file is larger than its name says."
    )


def dequantized_warning(folder: Path, kind: GgufType) -> str | None:
    """What to say where weights that were quantized once are quantized to few bits again."""
    if not kind.has_few_bits or not is_dequantized_merge(folder):
        return None
    return (
        f"{folder} is a merge into the dequantized base: its weights were rounded to 4 bits "
        f"before, and {kind.name} rounds them a second time, on another grid, which costs much "
        "more than rounding once. Merge into the original weights (merge --base original) for "
        "4-bit types, or keep the adapter beside the base (lora-gguf)."
    )


def is_dequantized_merge(folder: Path) -> bool:
    """Whether a merge's own certificate says that its base had been quantized to few bits."""
    path = folder / _CERTIFICATE
    if not path.is_file():
        return False
    certificate = json.loads(path.read_text(encoding="utf-8"))
    trained_on = certificate.get("trained_on", {}).get("quantization", {})
    return certificate.get("base") == "dequantized" and bool(trained_on.get("load_in_4bit"))
