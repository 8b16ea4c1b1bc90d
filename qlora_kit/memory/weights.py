"""The tensors of a loaded model, by what they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_kit.model.quantized import eight_bit_scale, is_four_bit, quant_state_tensors

if TYPE_CHECKING:
    from torch import nn

    from qlora_kit.memory.live import LiveTensors

PACKED, CONSTANTS, EIGHT_BIT = "4-bit weights", "their constants", "8-bit weights"
UNQUANTIZED, ADAPTER = "unquantized weights", "adapter"


def hold_weights(model: nn.Module, live: LiveTensors) -> None:
    """Count parameters, buffers and what stands beside quantized weights."""
    parameter: Any
    for parameter in model.parameters():
        if is_four_bit(parameter):
            live.hold([parameter], PACKED)
            live.hold(quant_state_tensors(parameter.quant_state), CONSTANTS)
        else:
            live.hold([parameter], ADAPTER if parameter.requires_grad else UNQUANTIZED)
    for module in model.modules():
        scale = eight_bit_scale(module)
        if scale is not None:
            live.hold(module.parameters(recurse=False), EIGHT_BIT)
            live.hold([scale], CONSTANTS)
    live.hold(model.buffers(), UNQUANTIZED)
