"""`onnx`, `onnx:int8-dynamic`, `onnx:int8-static`: what they take, and how a folder is made."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from qlora_kit.errors import Fault, ModelError
from qlora_kit.extras import require_extra
from qlora_kit.model.companions import copy_companions
from qlora_kit.quantize.layers import quantized_layers, require_quantizable
from qlora_kit.quantize.load import load_source
from qlora_kit.quantize.method import Calibration, Made, Method, MethodOptions, Source
from qlora_kit.quantize.small import skips_that_fit, some_text, try_on_small
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT_BYTES = 4
# Of the graph's description, for each linear layer: 23 kB were measured.
_GRAPH_BYTES = 2**16
_CHECK_TOKENS = 32
# Of logits, against the model in float32; measured differences are below 1e-5 (docs).
_MAX_DIFFERENCE = 1e-3


class OnnxOptions(MethodOptions):
    """Options of onnx: none."""


class Int8DynamicOptions(MethodOptions):
    """Options of onnx:int8-dynamic."""

    skip_modules: tuple[str, ...] = Field(default=())
    """Linear layers to leave in float32, by name or part of one, beside the output head."""

    reduce_range: bool = True
    """Use 7 of the 8 bits of a weight: processors with AVX2 but without VNNI add pairs of products
    in 16 bits, which saturate otherwise. It costs next to nothing (docs/onnx-gptq.md)."""

    def contradictions(self) -> Iterator[Fault]:
        if not all(self.skip_modules):
            yield Fault("skip_modules", "must not hold empty text", "remove it")


class Int8StaticOptions(Int8DynamicOptions):
    """Options of onnx:int8-static."""

    activation_range: Literal["minmax", "moving-average"] = "minmax"
    """Range of an activation: the widest seen in the calibration text, or a mean over its
    sequences."""


_OPTIONS: dict[str, type[MethodOptions]] = {
    "onnx": OnnxOptions,
    "onnx:int8-dynamic": Int8DynamicOptions,
    "onnx:int8-static": Int8StaticOptions,
}


def method(name: str) -> Method:
    """
    Raises:
        ModelError: there is no such variant.
    """
    if name not in _OPTIONS:
        raise ModelError(f"there is no method {name}; there are {', '.join(_OPTIONS)}.")
    return Method(
        name=name,
        options=_OPTIONS[name],
        check=partial(_check, name),
        predict_bytes=_predict_bytes,
        make=partial(_make, name),
        calibration=lambda options: "required" if name == "onnx:int8-static" else "none",
        try_small=_try_small,
    )


def _check(name: str, source: Source, options: MethodOptions) -> None:
    require_extra("onnx", f"--method {name}")
    if isinstance(options, Int8DynamicOptions):
        require_quantizable(source, options.skip_modules, name)


def _try_small(source: Source, options: MethodOptions) -> str:
    return try_on_small(source, partial(_try, options))


def _try(options: MethodOptions, small: Source, model: PreTrainedModel) -> None:
    """
    Raises:
        ModelError: torch's exporter or ONNX Runtime's quantizer cannot follow it.
    """
    from qlora_kit.quantize.onnx.graph import GRAPH_FILE, export_graph

    with TemporaryDirectory(prefix="qlora-kit-onnx-") as scratch:
        folder = Path(scratch)
        model = model.cpu()
        export_graph(model, folder / GRAPH_FILE)
        _require_alike(small, _difference(model, folder / GRAPH_FILE))
        _check_graph(folder / GRAPH_FILE)
        if isinstance(options, Int8DynamicOptions):
            names = quantized_layers(
                small.skeleton, skips_that_fit(small.skeleton, options.skip_modules)
            )
            graphs = (folder / GRAPH_FILE, folder / f"int8-{GRAPH_FILE}")
            _quantize(*graphs, names, options, some_text(), SILENT)


def _predict_bytes(source: Source, options: MethodOptions) -> int:
    """A float32 graph, which an integer one is made from and stands beside for a while."""
    whole = _FLOAT_BYTES * source.num_parameters
    whole += _GRAPH_BYTES * len(source.skeleton.linear_modules)
    return 2 * whole if isinstance(options, Int8DynamicOptions) else whole


def _make(
    name: str,
    source: Source,
    options: MethodOptions,
    calibration: Calibration | None,
    draft: Path,
    reporter: Reporter,
) -> Made:
    from qlora_kit.quantize.onnx.graph import GRAPH_FILE, export_graph

    folder = draft / "float32" if isinstance(options, Int8DynamicOptions) else draft
    folder.mkdir(exist_ok=True)
    with reporter.progress(f"exporting {name}", 2) as progress:
        model = load_source(source, torch.float32).cpu()
        has_cache = export_graph(model, folder / GRAPH_FILE)
        progress.update()
        difference = _difference(model, folder / GRAPH_FILE)
        progress.update()
    _require_alike(source, difference)
    _write_companions(source, model, draft)
    del model
    gc.collect()
    findings: dict[str, Any] = {"has_cache": has_cache, "max_logit_difference": difference}
    notes = [f"logits of the float32 graph and of the model differ by {difference:.1e} at most"]
    if not has_cache:
        notes.append(
            "the model keeps more of a text than keys and values, so the graph has no cache: each "
            "new token is computed from the whole text"
        )
    if isinstance(options, Int8DynamicOptions):
        names = quantized_layers(source.skeleton, options.skip_modules)
        _quantize(folder / GRAPH_FILE, draft / GRAPH_FILE, names, options, calibration, reporter)
        shutil.rmtree(folder)
        findings["num_layers"] = len(names)
        notes.append(f"{len(names)} linear layers in 8 bits; the rest, the head too, in float32")
        notes.extend(saturation_notes(options))
    _check_graph(draft / GRAPH_FILE)
    return Made(findings=findings, notes=tuple(notes))


def _quantize(
    graph: Path,
    out: Path,
    names: list[str],
    options: Int8DynamicOptions,
    calibration: Calibration | None,
    reporter: Reporter,
) -> None:
    from qlora_kit.quantize.onnx import int8

    nodes = int8.linear_nodes(graph, names)
    if not isinstance(options, Int8StaticOptions):
        int8.quantize_dynamically(graph, out, nodes, options.reduce_range)
        return
    assert calibration is not None
    with reporter.progress("calibrating", calibration.num_tokens) as progress:
        reader = int8.SequenceReader(graph, calibration.sequences, progress)
        int8.quantize_statically(
            graph, out, nodes, options.reduce_range, reader, options.activation_range
        )


def saturation_notes(options: Int8DynamicOptions) -> Iterator[str]:
    """What is measured on this machine is then not what the graph is worth on another."""
    from qlora_kit.quantize.onnx.saturation import products_saturate

    if not options.reduce_range and products_saturate():
        yield (
            "this processor cuts off sums of weights in 8 bits (AVX2 without VNNI), so the figures "
            "are worse here than on one that does not; reduce_range=true is right on both"
        )


def _difference(model: PreTrainedModel, graph: Path) -> float:
    """Largest difference of a logit between the model and its graph, on random tokens."""
    from qlora_kit.runtime.onnx_session import OnnxSession

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(
        0, vocabulary, (1, _CHECK_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.numpy()
    session = OnnxSession(graph)
    if session.has_cache:
        first, rest = ids.split(_CHECK_TOKENS // 2, dim=1)
        step = session.run(first.numpy())
        after = session.run(rest.numpy(), step.past)
        found = np.concatenate([step.logits, after.logits], axis=1)
    else:
        found = session.run(ids.numpy()).logits
    return float(np.abs(found - wanted).max())


def _require_alike(source: Source, difference: float) -> None:
    if not difference <= _MAX_DIFFERENCE:
        raise ModelError(
            f"the graph that was made of {source.name} is not the model: logits differ by "
            f"{difference:.2g}; nothing was kept. gguf:TYPE may take it."
        )


def _check_graph(path: Path) -> None:
    """
    Raises:
        ModelError: onnx finds a fault in it.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the graph that was made is not valid ONNX: {error}") from error


def _write_companions(source: Source, model: PreTrainedModel, draft: Path) -> None:
    """Configuration, generation settings and tokenizer, as the source has them."""
    copy_companions(source.folder, draft, source.trust_remote_code)
    config = json.loads((source.folder / "config.json").read_bytes())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = "float32"
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
