"""An adapter on disk together with everything about its base that decides what it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from qlora_kit.errors import ModelError
from qlora_kit.export.dense import AsTrained
from qlora_kit.model.base import prequantized_settings
from qlora_kit.model.manifest import MANIFEST_FILE, read_manifest
from qlora_kit.model.qat.aware import Aware

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.model.base import Base
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.model.source import ModelSource
    from qlora_kit.recipe import ModelSpec, QuantizationSpec

BaseKind = Literal["dequantized", "original"]


@dataclass(frozen=True)
class TrainedAdapter:
    """What a merge needs to know; all of it but the files in `folder` is small."""

    folder: Path
    source: ModelSource
    skeleton: Skeleton
    tokenizer: PreTrainedTokenizerBase
    """With the tokens that training added."""
    quantization: QuantizationSpec
    compute_dtype: torch.dtype
    device: str = "cpu"
    """The kind of device that training quantized the base on."""
    allow_pickle: bool = False
    trust_remote_code: bool = False
    aware: Aware | None = None
    """How the merged weights were quantized in training, where they were."""

    @property
    def as_trained(self) -> AsTrained:
        return AsTrained(self.quantization, self.compute_dtype, self.device)

    @property
    def bases(self) -> tuple[BaseKind, ...]:
        """What it can be merged into: one that is stored quantized has no original, and one that
        was trained in 16 bits has nothing to dequantize.
        """
        if prequantized_settings(self.skeleton) is not None:
            return ("dequantized",)
        return ("dequantized", "original") if self.quantization.is_quantized else ("original",)

    def require_base(self, base: BaseKind) -> None:
        """Raises ModelError where there is no such base."""
        if base in self.bases:
            return
        why = (
            "is stored quantized, so its 16-bit weights are not there"
            if base == "original"
            else "was not quantized in training"
        )
        raise ModelError(
            f"the base {self.source.name} {why}; merge into the {self.bases[0]} one (or auto)."
        )


def trained_adapter(
    folder: Path, base: Base, quantization: QuantizationSpec, spec: ModelSpec
) -> TrainedAdapter:
    """The adapter saved in `folder`, for a base that is loaded."""
    has_manifest = (folder / MANIFEST_FILE).is_file()
    record = read_manifest(folder).quantization_aware if has_manifest else None
    return TrainedAdapter(
        folder=folder,
        source=base.source,
        skeleton=base.skeleton,
        tokenizer=base.tokenizer,
        quantization=quantization,
        compute_dtype=base.compute_dtype,
        device=base.model.device.type,
        allow_pickle=spec.allow_pickle,
        trust_remote_code=spec.trust_remote_code,
        aware=Aware.from_record(record),
    )
