"""A base that keeps some linear layers in 4 bits and others in 8, registered with transformers.

transformers' own bitsandbytes quantizers know one width each. With this module imported,
`from_pretrained` loads both kinds side by side and reads back what `save_pretrained` wrote; plain
transformers, which has never heard of the method, refuses such a folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import (
    Bnb4bitDeserialize,
    Bnb4bitQuantize,
    Bnb8bitDeserialize,
    Bnb8bitQuantize,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

from qlora_kit.model.prequantized import MIXED_METHOD

_STORED = (
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_map",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "SCB",
    "weight_format",
    "weight",
)


@register_quantization_config(MIXED_METHOD)
class MixedBitsConfig(QuantizationConfigMixin):
    """What is written into a checkpoint's config.json: the bits of every quantized module."""

    def __init__(
        self,
        bits: Mapping[str, int],
        quant_type: str = "nf4",
        double_quant: bool = True,
        quant_storage: str = "uint8",
        compute_dtype: str = "float32",
        int8_threshold: float = 6.0,
        quant_method: str = MIXED_METHOD,
    ):
        """`bits` are 4 or 8 by the full name of a module; all others stay as they are."""
        self.quant_method = quant_method  # type: ignore[assignment]
        self.bits = dict(bits)
        self.quant_type = quant_type
        self.double_quant = double_quant
        self.quant_storage = quant_storage
        self.compute_dtype = compute_dtype
        self.int8_threshold = int8_threshold


@register_quantizer(MIXED_METHOD)
class MixedBitsQuantizer(HfQuantizer):
    """bitsandbytes' layers, each of the width that the configuration gives it."""

    quantization_config: MixedBitsConfig

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: Any
    ) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) and name != "bias"

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Bytes of one parameter."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return self.quantization_config.bits[param_name.rpartition(".")[0]] / 8

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        for name, bits in self.quantization_config.bits.items():
            original = model.get_submodule(name)
            layer = self._empty(original, bits)
            layer.source_cls = type(original)  # type: ignore[assignment]
            layer.requires_grad_(False)
            model.set_submodule(name, layer)

    def _empty(self, original: nn.Module, bits: int) -> nn.Module:
        """A layer of the right width in place of `original`, without weights."""
        settings = self.quantization_config
        shape: Any = original.weight.shape if isinstance(original, Conv1D) else None
        num_in, num_out = shape or (original.in_features, original.out_features)
        has_bias = original.bias is not None
        layer: nn.Module
        with torch.device("meta"):
            if bits == 8:
                layer = bnb.nn.Linear8bitLt(
                    num_in,
                    num_out,
                    has_bias,
                    has_fp16_weights=False,
                    threshold=settings.int8_threshold,
                )
                stored_as = torch.int8
            else:
                stored_as = getattr(torch, settings.quant_storage)
                layer = bnb.nn.Linear4bit(
                    num_in,
                    num_out,
                    has_bias,
                    getattr(torch, settings.compute_dtype),
                    compress_statistics=settings.double_quant,
                    quant_type=settings.quant_type,
                    quant_storage=stored_as,
                )
        if self.pre_quantized:
            weight: Any = layer.weight
            weight.data = weight.data.to(stored_as)
        return layer

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **options: Any
    ) -> PreTrainedModel:
        """PEFT and Trainer ask these flags what layers there are."""
        loaded: Any = model
        loaded.is_loaded_in_4bit = loaded.is_loaded_in_8bit = True
        loaded.quantization_method = QuantizationMethod.BITS_AND_BYTES
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(_STORED), "weight", operations=[_Deserialize(self)])]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """Hand a weight to bitsandbytes' operation for its layer."""

    def __init__(self, quantizer: MixedBitsQuantizer):
        self._four, self._eight = Bnb4bitQuantize(quantizer), Bnb8bitQuantize(quantizer)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **options: Any,
    ) -> dict[str, Any]:
        (name,) = input_dict
        module, _ = get_module_from_name(options["model"], name)
        operation = self._eight if isinstance(module, bnb.nn.Linear8bitLt) else self._four
        return operation.convert(input_dict, **options)


class _Deserialize(ConversionOps):
    """The same for what is stored quantized."""

    def __init__(self, quantizer: MixedBitsQuantizer):
        self._four, self._eight = Bnb4bitDeserialize(quantizer), Bnb8bitDeserialize(quantizer)

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **options: Any,
    ) -> dict[str, Any]:
        operation = self._eight if "SCB" in input_dict else self._four
        return operation.convert(input_dict, **options)
