"""What torch's exporter lacks for mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  (registers the operator below)
from onnxscript.onnx_opset import opset18 as op


def _grouped_mm(rows: Any, weights: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of one expert after the other, each multiplied with its expert's weights.

    rows (M, K), weights (experts, K, N), offs (experts,): where each expert's rows end → (M, N).
    One product for each expert, whether it has rows or not.
    """
    ends = op.Cast(offs, to=7)
    first = op.Constant(value_ints=[0])
    start = first
    products = []
    for expert in range(weights.shape[0]):
        here, after = op.Constant(value_ints=[expert]), op.Constant(value_ints=[expert + 1])
        end = op.Slice(ends, here, after, first)
        own = op.Squeeze(op.Slice(weights, here, after, first), first)
        products.append(op.MatMul(op.Slice(rows, start, end, first), own))
        start = end
    return op.Concat(*products, axis=0)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.transformers.grouped_mm_fallback.default: _grouped_mm,
    torch.ops.aten._grouped_mm.default: _grouped_mm,
}
"""By torch operator; handed to `torch.onnx.export`."""
