"""A float32 graph in 8-bit integers, by ONNX Runtime's quantizer."""

from __future__ import annotations

import ast
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.report.reporter import Progress

ActivationRange = Literal["minmax", "moving-average"]

_OPERATORS = ["MatMul", "Gemm"]
_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "model."


def linear_nodes(graph: Path, names: Collection[str]) -> list[str]:
    """Of linear layers, by their names in the model, the nodes that multiply with their weights.

    Raises:
        ModelError: a layer has none.
    """
    model = onnx.load(str(graph), load_external_data=False)
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type in _OPERATORS and node.input[1] in stored:
            for name in names_of(node):
                found[name] = node.name
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(
            f"{len(missing)} linear layers are no products with stored weights in the graph "
            f"({', '.join(missing[:3])} …), so ONNX Runtime cannot quantize them; keep the model "
            f"in float32 (--method onnx)."
        )
    return [found[name] for name in names]


def names_of(node: onnx.NodeProto) -> list[str]:
    """The modules that a node of an exported graph stands in, outermost first."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            return [scope.removeprefix(_WRAPPER) for scope in ast.literal_eval(entry.value)]
    return []


def quantize_dynamically(graph: Path, out: Path, nodes: list[str], reduce_range: bool) -> None:
    """Weights once, one scale for each output; activations at every step, from what they are.

    Raises:
        ModelError: a layer was left as it is.
    """
    with _quiet():
        quantize_dynamic(
            str(graph),
            str(out),
            op_types_to_quantize=list(_OPERATORS),
            # Each Gemm is replaced by a product of this name and a sum first.
            nodes_to_quantize=[*nodes, *(f"{node}_MatMul" for node in nodes)],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    require_quantized(graph, out, nodes)


def quantize_statically(
    graph: Path,
    out: Path,
    nodes: list[str],
    reduce_range: bool,
    reader: CalibrationDataReader,
    activation_range: ActivationRange,
) -> None:
    """Activations too in a range that is fixed here, between QuantizeLinear and its inverse.

    Raises:
        ModelError: a layer was left as it is.
    """
    with _quiet():
        quantize_static(
            str(graph),
            str(out),
            reader,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_providers=["CPUExecutionProvider"],
            use_external_data_format=True,
            extra_options={
                "MatMulConstBOnly": True,
                # The sum stays in float32: only what goes into a product is rounded.
                "OpTypesToExcludeOutputQuantization": list(_OPERATORS),
                "CalibMovingAverage": activation_range == "moving-average",
            },
        )
    require_quantized(graph, out, nodes)


def require_quantized(graph: Path, out: Path, nodes: Collection[str]) -> None:
    """The quantizer passes over what it cannot take without a word.

    Raises:
        ModelError: fewer weights are integers than were to be.
    """
    before = onnx.load(str(graph), load_external_data=False).graph
    after = onnx.load(str(out), load_external_data=False).graph
    chosen = set(nodes)
    wanted = {node.input[1] for node in before.node if node.name in chosen}
    made = [
        one
        for one in after.initializer
        if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2
    ]
    if len(made) != len(wanted):
        raise ModelError(
            f"ONNX Runtime's quantizer took {len(made)} of the {len(wanted)} linear layers and "
            "left the others in float32 without saying why; keep the model so (--method onnx)."
        )


class SequenceReader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration text, one sequence after the other, each from an empty past."""

    def __init__(
        self, graph: Path, sequences: Sequence[TokenSequence], progress: Progress | None = None
    ):
        self._inputs = onnx.load(str(graph), load_external_data=False).graph.input
        self._sequences = iter(sequences)
        self._progress = progress

    def get_next(self) -> dict[str, Any] | None:
        sequence = next(self._sequences, None)
        if sequence is None:
            return None
        if self._progress is not None:
            self._progress.update(sequence.num_tokens)
        ids = np.array([sequence.input_ids], dtype=np.int64)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        }
        return {
            one.name: given[one.name] if one.name in given else _nothing_yet(one)
            for one in self._inputs
        }


def _nothing_yet(one: onnx.ValueInfoProto) -> Any:
    """The keys or values of a text of no tokens."""
    _, heads, _, size = (dim.dim_value for dim in one.type.tensor_type.shape.dim)
    return np.zeros((1, heads, 0, size), dtype=np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises, through the root logger, to fold constants first; that is done."""
    logger = logging.getLogger()
    kept = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(kept)
