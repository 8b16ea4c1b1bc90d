"""Add an adapter to its base in float32, round once, and write the sum shard by shard."""

from __future__ import annotations

import copy
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_kit.errors import AdapterError, HardwareError, ModelError, RunError
from qlora_kit.export.delta import SavedAdapter, merge_weight, read_adapter, survival
from qlora_kit.export.dense import AsTrained, DenseTensor, iterate_dense
from qlora_kit.export.names import tied_parameters
from qlora_kit.export.shards import ShardWriter
from qlora_kit.model.atomic import draft_beside
from qlora_kit.model.skeleton import Skeleton
from qlora_kit.model.source import ModelSource
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report.reporter import SILENT, Progress, Reporter

BaseKind = Literal["dequantized", "original"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Survival:
    """How much of each update is left after rounding; 1 is all of it."""

    min: float
    median: float
    worst: str
    """The module that lost most."""


@dataclass(frozen=True)
class MergeResult:
    """A merged model on the disk."""

    folder: Path
    base: BaseKind
    dtype: str
    survival: Survival | None
    """None where the adapter has no low-rank update."""
    num_modules: int
    num_bytes: int
    seconds: float


@dataclass
class _Ledger:
    """What has been merged so far."""

    survivals: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)


def merge_adapter(
    *,
    source: ModelSource,
    skeleton: Skeleton,
    adapter_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    quantization: QuantizationSpec,
    compute_dtype: torch.dtype,
    base: BaseKind,
    out: Path,
    dtype: DtypeName = "auto",
    max_shard_bytes: int = 4 * 1024**3,
    device: str = "cpu",
    allow_pickle: bool = False,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Merge into `out`, which appears whole or not at all.

    `device` is where training quantized the base; it quantizes there again.

    Raises:
        RunError: `out` exists.
        ModelError: the base cannot be read, or the sum does not fit the dtype.
        AdapterError: a tensor of the adapter belongs to no parameter of this base.
        HardwareError: no room on the disk.
    """
    start = time.monotonic()
    require_absent(out)
    adapter = read_adapter(adapter_folder, skeleton)
    as_trained = AsTrained(quantization, compute_dtype, device) if base == "dequantized" else None
    rounded = _target_dtype(dtype, skeleton)
    with draft_beside(out) as draft:
        writer = ShardWriter(draft, max_shard_bytes)
        ledger = _Ledger()
        tensors = iterate_dense(source.folder, skeleton, as_trained, adapter.modules, allow_pickle)
        with reporter.progress(f"merge ({base})", len(skeleton.model.state_dict())) as progress:
            for dense in tensors:
                _merge_one(dense, adapter, skeleton, rounded, writer, ledger, progress)
        writer.close()
        _save_config(skeleton.model.config, rounded, draft)
        tokenizer.save_pretrained(draft)
        draft.rename(out)
    return MergeResult(
        folder=out,
        base=base,
        dtype=str(rounded).removeprefix("torch."),
        survival=_summary(ledger.survivals),
        num_modules=len(adapter.modules),
        num_bytes=writer.num_bytes,
        seconds=time.monotonic() - start,
    )


def require_absent(out: Path) -> None:
    """Raises RunError where something is there already."""
    if out.exists():
        raise RunError(f"{out} exists already; remove it, or name another folder.")


def _merge_one(
    dense: DenseTensor,
    adapter: SavedAdapter,
    skeleton: Skeleton,
    dtype: torch.dtype,
    writer: ShardWriter,
    ledger: _Ledger,
    progress: Progress,
) -> None:
    progress.update()
    value = dense.value
    if dense.parameter is not None and dense.module is not None:
        ledger.seen.add(dense.parameter)
        if dense.parameter in adapter.replaced:
            value = adapter.replaced[dense.parameter].float()
        elif dense.parameter == f"{dense.module}.weight" and dense.module in adapter.lora:
            value = merge_weight(adapter, dense.module, skeleton, dense.value)
            kept = value.to(dtype)
            ledger.survivals[dense.module] = survival(value - dense.value, kept, dense.value)
    writer.add(dense.name, _round(value, dtype, dense.name))


def _round(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(rounded).all():
        raise ModelError(
            f"{name} reaches {value.abs().max():.3g}, which float16 cannot hold (65504); merge "
            "with dtype bfloat16 or float32."
        )
    return rounded


def _target_dtype(dtype: DtypeName, skeleton: Skeleton) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = skeleton.model.config.dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _save_config(config: PreTrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(folder)


def _summary(survivals: dict[str, float]) -> Survival | None:
    if not survivals:
        return None
    worst = min(survivals, key=survivals.__getitem__)
    return Survival(survivals[worst], statistics.median(survivals.values()), worst)
