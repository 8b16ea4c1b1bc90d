"""Weights in a graph: stored the way round they are multiplied, so that a quantizer finds them."""

from __future__ import annotations

from typing import Any

import numpy as np


def turn_stored_weights(model: Any) -> int:
    """Replace every Transpose of a stored weight that nothing else reads by the weight turned.

    torch folds small ones itself and leaves large ones to the runtime, which then holds them twice.
    A tied head reads the embedding, which stays as it is. Returns how many were turned.

    Args:
        model: an `onnx_ir.Model`, changed in place.
    """
    import onnx_ir as ir

    graph = model.graph
    turned = 0
    for node in list(graph):
        if node.op_type != "Transpose":
            continue
        weight, output = node.inputs[0], node.outputs[0]
        name = weight.name
        if name not in graph.initializers or len(weight.uses()) > 1 or output.is_graph_output():
            continue
        order = node.attributes["perm"].as_ints()
        array = np.ascontiguousarray(weight.const_value.numpy().transpose(order))
        fresh = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=output.type,
            const_value=ir.tensor(array, name=name),
        )
        for user, place in tuple(output.uses()):
            user.replace_input_with(place, fresh)
        graph.remove(node, safe=True)
        del graph.initializers[name]
        graph.initializers[name] = fresh
        turned += 1
    return turned
