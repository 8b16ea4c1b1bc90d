"""llama.cpp's importance matrix: how much each column of a weight counts, seen on calibration text.

For every input feature of a layer the mean of x² over the tokens, by which llama.cpp weighs the
errors of rounding; what its own `llama-imatrix` computes.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_kit.errors import ModelError
from qlora_kit.model.skeleton import is_linear
from qlora_kit.quantize.gguf.importance_file import COUNTS, SUMS
from qlora_kit.quantize.int8.observe import observe
from qlora_kit.quantize.load import computing_dtype, load_source

if TYPE_CHECKING:
    from qlora_kit.quantize.method import Calibration, Source
    from qlora_kit.report.reporter import Reporter

# The matrices that activations are multiplied with; the embedding is looked up in.
_LAYERS = ("blk.", "output.")


@dataclass(frozen=True)
class Importance:
    """What a model's layers were given."""

    sums: Mapping[str, torch.Tensor]
    """By layer: (I,), float64, the sum of x² over the tokens, for each feature of its input."""
    counts: Mapping[str, int]
    """By layer: tokens."""
    calibration: Calibration


def measure_importance(source: Source, calibration: Calibration, reporter: Reporter) -> Importance:
    """Run the model on the text, and look at the input of every linear layer.

    Raises:
        ModelError: what a layer was given is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def look(layer: str, inputs: torch.Tensor) -> None:
        squares = inputs.double().square().sum(dim=0).cpu()
        sums[layer] = sums[layer] + squares if layer in sums else squares
        counts[layer] = counts.get(layer, 0) + len(inputs)

    model = load_source(source, computing_dtype(source))
    layers = [name for name, module in model.named_modules() if is_linear(module)]
    observe(model, layers, calibration.sequences, look, reporter)
    del model
    gc.collect()
    for layer, seen in sums.items():
        if not bool(seen.isfinite().all()):
            raise ModelError(
                f"what {layer} of {source.name} is given on the calibration text is not finite, "
                "so nothing can be weighed by it; try other text, or a wider dtype."
            )
    return Importance(sums, counts, calibration)


def write_importance(importance: Importance, between: Path, path: Path) -> tuple[int, int]:
    """Write llama.cpp's file for the tensors of a converted model.

    Returns:
        How many of the file's matrices it says something of, and how many there are. Those of
        fused experts are among the ones that it does not.
    """
    from gguf import GGUFWriter

    from qlora_kit.runtime.gguf_header import read_header

    header = read_header(between)
    matrices = {
        one.name: one.shape[0]
        for one in header.tensors
        if one.name.startswith(_LAYERS) and len(one.shape) > 1 and min(one.shape) > 1
    }
    writer = GGUFWriter(path, arch="", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [importance.calibration.description])
    writer.add_uint32("imatrix.chunk_count", len(importance.calibration.sequences))
    longest = max(one.num_tokens for one in importance.calibration.sequences)
    writer.add_uint32("imatrix.chunk_size", longest)
    named = dict(_named(importance, header.architecture))
    found = 0
    for name, columns in matrices.items():
        layer = named.get(name)
        if layer is None or len(importance.sums[layer]) != columns:
            continue
        found += 1
        sums = importance.sums[layer].to(torch.float32).numpy().reshape(1, -1)
        counts = torch.tensor([[float(importance.counts[layer])]]).numpy()
        writer.add_tensor(name + SUMS, sums)
        writer.add_tensor(name + COUNTS, counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found, len(matrices)


def _named(importance: Importance, architecture: str) -> Iterator[tuple[str, str]]:
    """llama.cpp's name of a tensor, and the layer whose weight it is."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architectures = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    number = architectures.get(architecture)
    if number is None:
        return
    blocks = 1 + max(map(_block_of, importance.sums), default=0)
    names = get_tensor_name_map(number, blocks)
    for layer in importance.sums:
        plain = layer.replace("language_model.", "")
        for spelled in dict.fromkeys((layer, plain, f"model.{plain}")):
            name = names.get_name(f"{spelled}.weight", try_suffixes=(".weight",))
            if name is not None:
                yield name, layer
                break


def _block_of(layer: str) -> int:
    return max((int(part) for part in layer.split(".") if part.isdigit()), default=0)


def weight_of(found: tuple[int, int]) -> str:
    """For a person."""
    share = math.floor(100 * found[0] / max(found[1], 1))
    return f"errors weighed by calibration text in {found[0]} of {found[1]} matrices ({share} %)"
