"""How a model is quantized in training, as a recipe says it and a manifest holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from qlora_kit.errors import AdapterError
from qlora_kit.recipe import QuantizationAwareSpec

if TYPE_CHECKING:
    from qlora_kit.model.qat.scheme import Scheme


@dataclass(frozen=True)
class Aware:
    """How a model is quantized in training, and so has to be when it is shipped."""

    spec: QuantizationAwareSpec
    merged_dtype: torch.dtype
    """What a merged weight is rounded to before it is quantized, as it is on the disk."""

    def record(self) -> dict[str, Any]:
        """For an adapter's manifest."""
        return {**self.spec.model_dump(mode="json"), "merged_dtype": _name(self.merged_dtype)}

    @classmethod
    def from_record(cls, record: dict[str, Any] | None) -> Aware | None:
        """Raises AdapterError where it is not what `record` wrote."""
        if record is None:
            return None
        values = dict(record)
        dtype = getattr(torch, str(values.pop("merged_dtype", None)), None)
        try:
            spec = QuantizationAwareSpec.model_validate(values)
        except ValidationError as error:
            raise AdapterError(f"the manifest's quantization_aware is none ({error}).") from None
        if not isinstance(dtype, torch.dtype):
            raise AdapterError("the manifest's quantization_aware does not say its merged_dtype.")
        return cls(spec, dtype)

    def scheme(self) -> Scheme:
        from qlora_kit.model.qat.integers import int4_group, int8
        from qlora_kit.model.qat.nf4 import Nf4

        if self.spec.method == "nf4":
            return Nf4(self.spec.block_size, self.spec.double_quant)
        if self.spec.method == "int8":
            return int8(self.merged_dtype)
        return int4_group(self.spec.group_size, self.merged_dtype)


def aware_of(spec: QuantizationAwareSpec | None, merged: str, compute: torch.dtype) -> Aware | None:
    """`merged` is export.merge_options.dtype; auto is the dtype that is trained in."""
    if spec is None:
        return None
    return Aware(spec, compute if merged == "auto" else getattr(torch, merged))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
