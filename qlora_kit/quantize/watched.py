"""bitsandbytes' quantizers as transformers has them, with what its configuration lacks: the size
of a block, and a word after each layer.

A model is quantized under these names and saved under bitsandbytes' own, so that what is on the
disk is a checkpoint like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from qlora_kit.model.quantized import four_bit_modules
from qlora_kit.quantize.errors_by_layer import OnLayer

FOUR_BIT = "qlora-kit-bitsandbytes-4bit"
EIGHT_BIT = "qlora-kit-bitsandbytes-8bit"


@register_quantization_config(FOUR_BIT)
@register_quantization_config(EIGHT_BIT)
class WatchedConfig(BitsAndBytesConfig):
    """`stock` as it is, but for blocks of `block_size` weights; `on_layer` is called after each
    quantized layer.
    """

    def __init__(self, stock: BitsAndBytesConfig, on_layer: OnLayer, block_size: int = 64):
        super().__init__(**stock.to_dict())
        self.quant_method: Any = FOUR_BIT if stock.load_in_4bit else EIGHT_BIT
        self.block_size = block_size
        self.on_layer = on_layer
        self.stock = stock


@register_quantizer(FOUR_BIT)
class FourBitQuantizer(Bnb4BitHfQuantizer):
    """4 bits, in blocks of another size than 64."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        assert isinstance(self.quantization_config, WatchedConfig)
        for module in four_bit_modules(model):
            module.weight.blocksize = self.quantization_config.block_size

    def get_quantize_ops(self) -> Any:
        return _WatchedFourBit(self)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        return _under_its_own_name(self, super()._process_model_after_weight_loading(model))


@register_quantizer(EIGHT_BIT)
class EightBitQuantizer(Bnb8BitHfQuantizer):
    """8 bits."""

    def get_quantize_ops(self) -> Any:
        return _WatchedEightBit(self)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        return _under_its_own_name(self, super()._process_model_after_weight_loading(model))


class _WatchedFourBit(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        given = _given(input_dict, options["model"])
        made: Any = super().convert(input_dict, *arguments, **options)
        for name, packed in made.items():
            packed.quant_state.dtype, kept = torch.float32, packed.quant_state.dtype
            dense = dequantize_4bit(packed.data, packed.quant_state)
            packed.quant_state.dtype = kept
            self.hf_quantizer.quantization_config.on_layer(name, given, dense)
        return made


class _WatchedEightBit(Bnb8bitQuantize):
    def convert(self, input_dict: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        given = _given(input_dict, options["model"])
        made: Any = super().convert(input_dict, *arguments, **options)
        for name, packed in made.items():
            dense = packed.data.float() * (packed.SCB.float().view(-1, 1) / 127.0)
            self.hf_quantizer.quantization_config.on_layer(name, given, dense)
        return made


def _given(input_dict: dict[str, Any], model: PreTrainedModel) -> torch.Tensor:
    """The one weight that is to be quantized, as (out, in)."""
    ((name, value),) = input_dict.items()
    tensor = value[0] if isinstance(value, list) else value
    assert isinstance(tensor, torch.Tensor)
    module: Any = model.get_submodule(name.rpartition(".")[0])
    return tensor.T if issubclass(module.source_cls, Conv1D) else tensor


def _under_its_own_name(quantizer: Any, model: PreTrainedModel) -> PreTrainedModel:
    """From here on the model is bitsandbytes', to be saved and loaded as such."""
    stock = quantizer.quantization_config.stock
    quantizer.quantization_config = model.config.quantization_config = stock
    model.quantization_method = stock.quant_method
    return model
