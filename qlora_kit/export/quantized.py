"""The merged model in the codes that its training saw, as a checkpoint that transformers loads.

Written tensor by tensor by the quantizer of the training itself, so that nothing is quantized
otherwise than it was trained. bitsandbytes' layout for nf4, compressed-tensors' for integers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from qlora_kit.errors import ModelError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.names import NameMap, map_names, module_of
from qlora_kit.export.shards import ShardWriter
from qlora_kit.model.base import bitsandbytes_config
from qlora_kit.model.qat.attach import quantized_in_training
from qlora_kit.model.qat.aware import Aware
from qlora_kit.model.skeleton import Skeleton, is_linear
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report.reporter import SILENT, Reporter

# Of the merged folder, what is not of the quantized one.
_OTHERS = (
    "artifact.json",
    "certificate.json",
    "config.json",
    "README.md",
    "model.safetensors.index.json",
)


@dataclass(frozen=True)
class Quantizer:
    """What training quantized with, without its weights."""

    skeleton: Skeleton
    aware: Aware
    compute_dtype: torch.dtype
    device: str
    """Where training quantized; kinds of devices may round a block's scale differently."""

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(quantized_in_training(self.skeleton, self.aware.spec))

    def stored(self, module: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors of a module, by what follows its name. weight: as it is in the module."""
        if isinstance(self.skeleton.model.get_submodule(module), Conv1D):
            weight = weight.T
        placed = weight.to(self.device).to(self.compute_dtype)
        tensors = self.aware.scheme().quantize(placed).stored()
        return {name: tensor.cpu() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Written:
    """A quantized folder."""

    num_modules: int
    num_bytes: int
    seconds: float


def write_quantized(
    merged: Path,
    folder: Path,
    quantizer: Quantizer,
    max_shard_bytes: int,
    reporter: Reporter = SILENT,
) -> Written:
    """Quantize the model in `merged` into the empty folder `folder`.

    merged: stored in the dtype that training rounded to.

    Raises:
        ModelError: a weight is fused with others when it is loaded.
    """
    started = time.monotonic()
    modules = quantizer.modules
    writer = ShardWriter(folder, max_shard_bytes)
    with Checkpoint(merged) as checkpoint:
        names = map_names(quantizer.skeleton, checkpoint.names(), modules)
        if names.fused:
            raise ModelError(
                f"{merged}: {names.fused[0]} is fused with others when it is loaded, so it cannot "
                "be stored quantized."
            )
        what = f"quantizing to {quantizer.aware.spec.method}"
        with reporter.progress(what, len(checkpoint.names())) as progress:
            for tensors in _tensors(checkpoint, names, quantizer, modules):
                for name, tensor in tensors.items():
                    writer.add(name, tensor)
                progress.update()
    writer.close()
    for path in sorted(merged.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OTHERS:
            shutil.copyfile(path, folder / path.name)
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(quantizer)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return Written(len(modules), writer.num_bytes, time.monotonic() - started)


def _tensors(
    checkpoint: Checkpoint, names: NameMap, quantizer: Quantizer, modules: frozenset[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """What becomes of each tensor of the merged model."""
    for name in (*names.passed, *names.unused):
        yield {name: checkpoint.tensor(name)}
    for name, parameter in names.parameters.items():
        tensor = checkpoint.tensor(name)
        module = module_of(parameter)
        if module not in modules or not parameter.endswith(".weight"):
            yield {name: tensor}
            continue
        stem = name.removesuffix(".weight")
        yield {stem + end: part for end, part in quantizer.stored(module, tensor).items()}


def quantization_config(quantizer: Quantizer) -> dict[str, Any]:
    """For config.json, so that `from_pretrained` knows what it reads."""
    spec, skeleton = quantizer.aware.spec, quantizer.skeleton
    if spec.method == "nf4":
        settings = QuantizationSpec(double_quant=spec.double_quant, skip_modules=spec.skip_modules)
        stock = bitsandbytes_config(settings, skeleton, quantizer.compute_dtype)
        assert stock is not None
        values: dict[str, Any] = stock.to_dict()
        return values
    linear = {name for name, module in skeleton.model.named_modules() if is_linear(module)}
    is_grouped = spec.method == "int4-group"
    weights = {
        "num_bits": 4 if is_grouped else 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if is_grouped else "channel",
        "group_size": spec.group_size if is_grouped else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(linear - quantizer.modules),
    }
