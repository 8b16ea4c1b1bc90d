"""Statistics of the weights as they are stored: nothing is loaded whole, and NaN are no fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_kit.errors import ModelError
from qlora_kit.model.find import find_skeleton
from qlora_kit.model.prequantized import prequantized_settings
from qlora_kit.model.scan import iterate_tensors
from qlora_kit.model.skeleton import Skeleton
from qlora_kit.model.stored import match_names
from qlora_kit.model.weights import readable_weights
from qlora_kit.quantize.rounding import Rounding
from qlora_kit.quantize.sensitivity.statistics import LayerStatistics, collect
from qlora_kit.recipe import ModelSpec
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def stored_statistics(
    spec: ModelSpec, rounding: Rounding, reporter: Reporter = SILENT
) -> list[LayerStatistics]:
    """Of every layer that can be quantized, in the order of the model.

    Raises:
        ModelError: the model cannot be read, is stored quantized, or has no such layer.
    """
    source, skeleton = find_skeleton(spec)
    if prequantized_settings(skeleton) is not None:
        raise ModelError(f"{source.name} is stored quantized; take the model in 16 bits.")
    names = skeleton.linear_modules
    weights = _weights(source.folder, skeleton, spec.allow_pickle)
    with reporter.progress("statistics of the weights", len(names)) as progress:
        found = {one.name: one for one in collect(weights, rounding, progress.update)}
    if not found:
        raise ModelError(f"{source.name} has no linear layer that could be quantized.")
    return [found[name] for name in names if name in found]


def _weights(
    folder: Path, skeleton: Skeleton, allow_pickle: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each layer's weight as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    weights = readable_weights(folder, allow_pickle)
    stored = weights.tensors or [name for name, _ in iterate_tensors(weights.files)]
    parameters = match_names(skeleton, stored).parameters
    wanted = {f"{name}.weight": name for name in skeleton.linear_modules}
    for tensor_name, tensor in iterate_tensors(weights.files):
        name = wanted.get(parameters.get(tensor_name, tensor_name))
        if name is not None:
            turned = isinstance(skeleton.model.get_submodule(name), Conv1D)
            yield name, tensor.T if turned else tensor
