"""Add an adapter to its base in float32, round once, and write the sum shard by shard."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qlora_kit.atomic import draft_beside
from qlora_kit.errors import ModelError, RunError
from qlora_kit.export.apply import MergedTensor, Merger
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.delta import read_adapter, survival
from qlora_kit.export.dense import (
    AsTrained,
    DenseTensor,
    iterate_dense,
    loaded_dtype,
    requantize,
)
from qlora_kit.export.in_memory import iterate_in_memory
from qlora_kit.export.names import module_of
from qlora_kit.export.plan import DtypeName, MergePlan, plan_merge
from qlora_kit.export.shards import ShardWriter, require_room
from qlora_kit.export.surroundings import (
    copy_code,
    save_config,
    save_generation_config,
    save_tokenizer,
)
from qlora_kit.export.trained import BaseKind, TrainedAdapter
from qlora_kit.model.base import loading_config
from qlora_kit.model.bits import quantized_bits
from qlora_kit.recipe import QuantizationSpec
from qlora_kit.report.reporter import SILENT, Progress, Reporter

QuantType = Literal["nf4", "fp4"]

MAX_SHARD_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Survival:
    """How much of each low-rank update is left as stored; 1 is all of it."""

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
    """What the weights are stored in; `nf4` or `fp4` where they were quantized again."""
    survival: Survival | None
    """None where the adapter has no low-rank update."""
    tied: bool
    """Whether embedding and head are one tensor."""
    num_modules: int
    num_bytes: int
    seconds: float


def merge_adapter(
    trained: TrainedAdapter,
    base: BaseKind,
    out: Path,
    *,
    dtype: DtypeName = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    requantize_to: QuantType | None = None,
    reporter: Reporter = SILENT,
) -> MergeResult:
    """Merge into the folder `out`, which appears whole or not at all.

    Memory holds one tensor and one shard at a time. `requantize_to` quantizes the sum again,
    which loses most of a light update: look at `survival`, and prefer base `original` for it.

    Raises:
        RunError: `out` exists.
        ModelError: the base cannot be read, has no such original, or overflows the dtype.
        AdapterError: a tensor of the adapter fits no parameter of this base.
        HardwareError: no room on the disk.
    """
    started = time.monotonic()
    require_absent(out)
    trained.require_base(base)
    adapter = read_adapter(trained.folder, trained.skeleton)
    again = None if requantize_to is None else _again(trained, requantize_to)
    lost = _Survivals(again, trained)
    with (
        Checkpoint(trained.source.folder, trained.allow_pickle) as checkpoint,
        draft_beside(out) as draft,
    ):
        plan = plan_merge(trained, base, dtype, checkpoint, adapter)
        plan.say(reporter)
        require_room(out, plan.num_bytes * (2 if again else 1))
        dense = draft / "dense"
        dense.mkdir()
        writer = ShardWriter(dense, max_shard_bytes)
        with reporter.progress(f"merging into the {base} base", plan.num_tensors) as progress:
            merger = Merger(adapter, trained.skeleton, plan.ties, plan.vocabulary)
            tensors = _dense_base(trained, base, checkpoint, plan)
            rounded = _rounded_sum(trained, plan, merger, tensors, lost, progress)
            for name, value in _under_stored_names(trained, plan, rounded):
                writer.add(name, value)
        writer.close()
        _save_surroundings(trained, plan, dense)
        finished = dense
        if again is not None:
            finished = _quantize_again(trained, again, dense, draft / "quantized", max_shard_bytes)
        num_bytes = sum(path.stat().st_size for path in finished.glob("*.safetensors"))
        finished.rename(out)
    return MergeResult(
        folder=out,
        base=base,
        dtype=requantize_to or str(plan.dtype).removeprefix("torch."),
        survival=lost.summary(),
        tied=plan.ties.config_ties,
        num_modules=len(adapter.modules),
        num_bytes=num_bytes,
        seconds=time.monotonic() - started,
    )


def write_dequantized(trained: TrainedAdapter, out: Path, reporter: Reporter = SILENT) -> Path:
    """The base alone, as training saw it, in the dtype that it is stored in: what the adapter can
    stand beside. Several adapters of one base share it.

    Raises:
        ModelError: tensors overflow the dtype.
    """
    if out.exists():
        return out
    adapter = read_adapter(trained.folder, trained.skeleton)
    with (
        Checkpoint(trained.source.folder, trained.allow_pickle) as checkpoint,
        draft_beside(out) as draft,
    ):
        plan = plan_merge(trained, "dequantized", "auto", checkpoint, adapter)
        plan.say_memory("dequantized", reporter)
        dense = draft / "dense"
        dense.mkdir()
        writer = ShardWriter(dense, MAX_SHARD_BYTES)
        with reporter.progress("dequantizing the base", plan.num_tensors) as progress:
            for name, value in _under_stored_names(
                trained, plan, _rounded_base(trained, plan, checkpoint, progress)
            ):
                writer.add(name, value)
        writer.close()
        _save_surroundings(trained, plan, dense)
        dense.rename(out)
    return out


def predict_bytes(trained: TrainedAdapter, base: BaseKind, dtype: DtypeName = "auto") -> int:
    """What the merged weights will take on the disk.

    Raises:
        ModelError, AdapterError: it cannot be merged.
    """
    trained.require_base(base)
    adapter = read_adapter(trained.folder, trained.skeleton)
    with Checkpoint(trained.source.folder, trained.allow_pickle) as checkpoint:
        return plan_merge(trained, base, dtype, checkpoint, adapter).num_bytes


def require_absent(out: Path) -> None:
    """Raises RunError where something is there already."""
    if out.exists():
        raise RunError(f"{out} exists already; remove it, or name another folder.")


@dataclass
class _Survivals:
    """What each update lost, as it is found out."""

    again: AsTrained | None
    trained: TrainedAdapter
    shares: dict[str, float] = field(default_factory=dict)

    @cached_property
    def bits(self) -> dict[str, int]:
        """Of the modules that are quantized again."""
        assert self.again is not None
        return quantized_bits(self.trained.skeleton, self.again.quantization)

    def note(self, merged: MergedTensor, rounded: torch.Tensor) -> None:
        if merged.base is None or merged.parameter is None:
            return
        module = module_of(merged.parameter)
        stored = rounded.float()
        if self.again is not None and module in self.bits:
            transposed = isinstance(self.trained.skeleton.model.get_submodule(module), Conv1D)
            stored = requantize(rounded, transposed, self.again, self.bits[module])
        rows = merged.base.shape[0]
        self.shares[module] = survival(
            merged.value[:rows] - merged.base, stored[:rows], merged.base
        )

    def summary(self) -> Survival | None:
        if not self.shares:
            return None
        worst = min(self.shares, key=self.shares.__getitem__)
        return Survival(self.shares[worst], statistics.median(self.shares.values()), worst)


def _dense_base(
    trained: TrainedAdapter, base: BaseKind, checkpoint: Checkpoint, plan: MergePlan
) -> Iterator[DenseTensor]:
    """The base, one tensor at a time where that can be."""
    if not plan.streams:
        return iterate_in_memory(trained, base)
    is_as_trained = base == "dequantized" or trained.aware is not None
    as_trained = trained.as_trained if is_as_trained else None
    return iterate_dense(checkpoint, plan.names, trained.skeleton, as_trained)


def _rounded_base(
    trained: TrainedAdapter, plan: MergePlan, checkpoint: Checkpoint, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """As training saw it, in the dtype that it is stored in."""
    for tensor in _dense_base(trained, "dequantized", checkpoint, plan):
        yield tensor.name, _round(tensor, trained, plan.dtype)
        progress.update()


def _rounded_sum(
    trained: TrainedAdapter,
    plan: MergePlan,
    merger: Merger,
    tensors: Iterator[DenseTensor],
    lost: _Survivals,
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Base and adapter, rounded once."""
    for merged in merger.merge(tensors):
        progress.update()
        rounded = _round(merged, trained, plan.dtype)
        lost.note(merged, rounded)
        yield merged.name, rounded


def _under_stored_names(
    trained: TrainedAdapter, plan: MergePlan, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Under the names of the checkpoint, whichever way they were read."""
    if plan.streams:
        yield from tensors
    else:
        yield from revert_weight_conversion(trained.skeleton.model, dict(tensors)).items()


def _round(
    tensor: DenseTensor | MergedTensor, trained: TrainedAdapter, dtype: torch.dtype
) -> torch.Tensor:
    if tensor.parameter is not None:
        dtype = loaded_dtype(trained.skeleton, tensor.parameter, dtype)
    return round_to(tensor.value, dtype, tensor.name)


def round_to(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Cast a tensor of floats; one of integers stays.

    Raises:
        ModelError: float16 cannot hold it.
    """
    if not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(rounded).all():
        raise ModelError(
            f"{name} reaches {value.abs().max():.3g}, and float16 ends at 65504; write bfloat16 "
            "or float32 instead."
        )
    return rounded


def _save_surroundings(trained: TrainedAdapter, plan: MergePlan, folder: Path) -> None:
    config = trained.skeleton.model.config
    tied = bool(trained.skeleton.model.all_tied_weights_keys)
    save_config(
        config,
        folder,
        dtype=plan.dtype,
        num_rows=plan.vocabulary.num_rows if plan.vocabulary.grown else None,
        ties=plan.ties.config_ties if tied else None,
    )
    save_generation_config(trained.source.folder, config, trained.tokenizer.eos_token_id, folder)
    save_tokenizer(trained.tokenizer, folder)
    if trained.trust_remote_code:
        copy_code(trained.source.folder, folder)


def _again(trained: TrainedAdapter, quant_type: QuantType) -> AsTrained:
    settings = QuantizationSpec(
        quant_type=quant_type,
        skip_modules=trained.quantization.skip_modules,
        # What was in 8 bits stays in 16: plain transformers reads no mixture of 4 and 8.
        overrides={
            pattern: 4 if bits == 4 else 16
            for pattern, bits in trained.quantization.overrides.items()
        },
    )
    return AsTrained(settings, trained.compute_dtype, trained.device)


def _quantize_again(
    trained: TrainedAdapter, again: AsTrained, dense: Path, folder: Path, max_shard_bytes: int
) -> Path:
    """Load the merged model in 4 bits and save it as such."""
    model = AutoModelForCausalLM.from_pretrained(
        dense,
        dtype=again.compute_dtype,
        quantization_config=loading_config(
            again.quantization, trained.skeleton, again.compute_dtype
        ),
        device_map={"": again.device},
        trust_remote_code=trained.trust_remote_code,
        local_files_only=True,
    )
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    save_tokenizer(trained.tokenizer, folder)
    return folder
