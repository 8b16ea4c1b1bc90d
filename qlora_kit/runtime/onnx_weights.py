"""What an ONNX graph holds: true parameters by form, and their bytes in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARAMETERS_KEY = "qlora_kit.num_parameters"
"""Among a graph's metadata: true parameters of the model it was made of."""
# What is stored beside a weight, or worked out from a configuration.
_NO_PARAMETERS = ("_scale", "_zero_point", "inv_freq")


@dataclass(frozen=True)
class StoredWeights:
    parameters: Mapping[str, int]
    memory_bytes: int


def stored_weights(path: Path) -> StoredWeights:
    """Count from the graph's description; the weights themselves are not read.

    In a graph of the kit's own, what is no integer is the rest of the model; in another one, every
    stored tensor that may be a weight. A tied head is a transpose of the embedding, which ONNX
    Runtime works out when it loads the graph, and keeps: its bytes count, its parameters do not
    count twice.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    parameters: Counter[str] = Counter()
    stored: dict[str, int] = {}
    for tensor in graph.initializer:
        count = math.prod(tensor.dims)
        stored[tensor.name] = _num_bytes(tensor, count)
        if _is_parameter(tensor):
            parameters[_form(tensor)] += count
    for entry in model.metadata_props:
        if entry.key == PARAMETERS_KEY:
            parameters["float32"] = int(entry.value) - sum(
                count for form, count in parameters.items() if form != "float32"
            )
    turned = sum(
        stored[node.input[0]]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in stored
    )
    return StoredWeights(dict(parameters.most_common()), sum(stored.values()) + turned)


def _is_parameter(tensor: Any) -> bool:
    """Not a scale, nor one of the constants that shapes and indices are worked out with."""
    if not tensor.dims or any(part in tensor.name for part in _NO_PARAMETERS):
        return False
    return _form(tensor) in ("float32", "float16", "bfloat16") or (
        _form(tensor) in ("int8", "uint8") and len(tensor.dims) > 1
    )


def _form(tensor: Any) -> str:
    return str(_dtype(tensor).name)


def _num_bytes(tensor: Any, count: int) -> int:
    return count * int(_dtype(tensor).itemsize)


def _dtype(tensor: Any) -> Any:
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
