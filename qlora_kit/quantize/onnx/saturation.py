"""Whether this machine's products of 8-bit integers are what they should be."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

_LENGTH = 16
_ACTIVATION, _WEIGHT = 255, 127


def products_saturate() -> bool:
    """Whether the largest products are cut off.

    With AVX2 and without VNNI two products are added in 16 bits, which end at 32,767:
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html (data type
    selection).
    """
    weights = np.full((_LENGTH, _LENGTH), _WEIGHT, dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["activations", "weights"], ["sums"])],
        "saturation",
        [helper.make_tensor_value_info("activations", TensorProto.UINT8, [1, _LENGTH])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [1, _LENGTH])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    activations = np.full((1, _LENGTH), _ACTIVATION, dtype=np.uint8)
    (sums,) = session.run(None, {"activations": activations})
    return bool((sums != _LENGTH * _ACTIVATION * _WEIGHT).any())
