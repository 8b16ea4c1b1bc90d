"""What transformers calls while it loads a model whose configuration is an `Int8Config`.

In order: `_process_model_before_weight_loading` on a model without weights (linear layers become
`Int8Linear`); for every weight of a 16-bit checkpoint `param_needs_quantization`, and where that
is so the operation of `get_quantize_ops`. A checkpoint in this format needs neither: its integers
and scales have the names and shapes of the layer's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qlora_kit.quantize.int8.config import METHOD, Int8Config
from qlora_kit.quantize.int8.layer import Int8Linear
from qlora_kit.quantize.int8.numbers import dequantize_weight, quantize_weight, weight_scales


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """8-bit integers, for transformers."""

    quantization_config: Int8Config

    def __init__(self, quantization_config: Int8Config, **options: Any):
        super().__init__(quantization_config, **options)
        self.conv1d: set[str] = set()
        """Layers whose weight a 16-bit checkpoint keeps as (in, out)."""
        if not self.pre_quantized and quantization_config.activations == "static":
            raise ValueError(
                f"{METHOD}: static activations need calibration text: "
                "qlora-kit quantize MODEL --method int8 --calibration FILE --out DIR"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **options: Any) -> None:
        config = self.quantization_config
        skips = self.get_modules_to_not_convert(
            model, config.skip_modules, list(model._keep_in_fp32_modules or ())
        )
        for name, module in list(model.named_modules()):
            is_conv1d = isinstance(module, Conv1D)
            if not (is_conv1d or type(module) is nn.Linear):
                continue
            if not should_convert_module(name, skips):
                continue
            num_in, num_out = _in_and_out(module)
            if config.granularity == "group" and num_in % config.group_size:
                raise ValueError(
                    f"{METHOD}: {name} has {num_in} inputs, which groups of {config.group_size} "
                    "do not divide"
                )
            with torch.device("meta"):
                layer = Int8Linear(num_in, num_out, module.bias is not None, config)
                if not self.pre_quantized:
                    # What is read in is a weight still, and is cast to the dtype that stands here.
                    layer.weight = nn.Parameter(torch.empty(module.weight.shape), False)
            model.set_submodule(name, layer)
            if is_conv1d:
                self.conv1d.add(name)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **options: Any
    ) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Int8Linear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        if self.param_needs_quantization(model, param_name):
            return 1
        return float(super().param_element_size(model, param_name, param))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Its activations are rounded, and no gradient passes a rounding."""
        return self.quantization_config.activations == "none"


class _Quantize(ConversionOps):
    """One weight of a 16-bit checkpoint into integers and scales."""

    def __init__(self, quantizer: Int8Quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        made: dict[str, torch.Tensor] = {}
        config = self.quantizer.quantization_config
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = name.removesuffix(".weight")
            turned = weight.T.contiguous() if layer in self.quantizer.conv1d else weight
            scales = weight_scales(turned, config.granularity, config.group_size)
            integers = quantize_weight(turned, scales)
            made[name] = nn.Parameter(integers, requires_grad=False)
            made[f"{layer}.weight_scale"] = scales
            if config.on_layer is not None:
                config.on_layer(name, turned, dequantize_weight(integers, scales))
        return made


def _in_and_out(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    num_out, num_in = weight.T.shape if isinstance(module, Conv1D) else weight.shape
    return num_in, num_out
