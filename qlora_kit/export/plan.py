"""What a merge will do, known before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qlora_kit.errors import ModelError
from qlora_kit.export.checkpoint import Checkpoint
from qlora_kit.export.delta import SavedAdapter
from qlora_kit.export.dense import loaded_dtype, stored_dtype
from qlora_kit.export.names import NameMap, map_names
from qlora_kit.export.ties import Ties, Vocabulary, resolve_ties, resolve_vocabulary
from qlora_kit.export.trained import BaseKind, TrainedAdapter
from qlora_kit.model.bits import quantized_bits
from qlora_kit.report.reporter import Reporter

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class MergePlan:
    """Names, dtype, ties and sizes of the merged model."""

    names: NameMap
    dtype: torch.dtype
    ties: Ties
    vocabulary: Vocabulary
    num_bytes: int
    """What the merged weights will take."""

    @property
    def num_tensors(self) -> int:
        return len(self.names.parameters) + len(self.names.passed) + len(self.names.fused)

    @property
    def streams(self) -> bool:
        """Whether it can be done tensor by tensor; else the base has to be loaded."""
        return not self.names.fused

    def say(self, reporter: Reporter) -> None:
        """What the user should know before it starts."""
        self.say_memory("merged", reporter)
        if self.names.unused:
            reporter.say(
                f"left out: {len(self.names.unused)} tensors of the checkpoint that this model "
                f"does not load ({', '.join(self.names.unused[:3])})"
            )
        for target, source in self.ties.broken:
            reporter.warn(f"{target} and {source} were one tensor; the adapter tells them apart.")

    def say_memory(self, done: str, reporter: Reporter) -> None:
        """Warn where the whole base has to be held at once; `done` says what is done to it."""
        if not self.streams:
            reporter.warn(
                f"{self.names.fused[0]} is fused with others when it is loaded, so the whole base "
                f"is {done} in memory."
            )


def plan_merge(
    trained: TrainedAdapter,
    base: BaseKind,
    dtype: DtypeName,
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
) -> MergePlan:
    """Match checkpoint, model and adapter.

    Raises:
        AdapterError: the vocabulary grew in a way that cannot be merged.
        ModelError: the checkpoint lacks parameters of the model, or training has quantized what
            was rounded to another dtype.
    """
    skeleton = trained.skeleton
    changed = set(adapter.modules)
    if base == "dequantized":
        changed |= quantized_bits(skeleton, trained.quantization).keys()
    names = map_names(skeleton, checkpoint.names(), changed)
    rounded = _rounded(trained, dtype, checkpoint, names)
    ties = resolve_ties(skeleton, checkpoint, names, adapter)
    _require_complete(trained, names, ties)
    vocabulary = resolve_vocabulary(skeleton, adapter, len(trained.tokenizer))
    return MergePlan(names, rounded, ties, vocabulary, _num_bytes(trained, rounded, ties))


def _rounded(
    trained: TrainedAdapter, dtype: DtypeName, checkpoint: Checkpoint, names: NameMap
) -> torch.dtype:
    asked = None if dtype == "auto" else getattr(torch, dtype)
    if trained.aware is None:
        return asked or stored_dtype(checkpoint, names)
    seen = trained.aware.merged_dtype
    if asked not in (None, seen):
        raise ModelError(
            f"the merged weights were rounded to {str(seen).removeprefix('torch.')} and quantized "
            f"in training, so in {dtype} they would be quantized otherwise; leave dtype on auto."
        )
    return seen


def _require_complete(trained: TrainedAdapter, names: NameMap, ties: Ties) -> None:
    """Every parameter is stored, but for one side of each tie and what fused tensors become."""
    if names.fused or names.passed:
        return
    found = set(names.parameters.values())
    for pair in (*ties.kept, *ties.broken):
        if found & set(pair):
            found |= set(pair)
    wanted = {name for name, _ in trained.skeleton.model.named_parameters()}
    missing = sorted(wanted - found)
    if missing:
        raise ModelError(
            f"{trained.source.name} has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}; it is incomplete."
        )


def _num_bytes(trained: TrainedAdapter, dtype: torch.dtype, ties: Ties) -> int:
    """Each parameter once, and twice where a tie breaks."""
    model = trained.skeleton.model
    sizes = {
        name: parameter.numel() * loaded_dtype(trained.skeleton, name, dtype).itemsize
        for name, parameter in model.named_parameters()
    }
    again = sum(sizes.get(source, sizes.get(target, 0)) for target, source in ties.broken)
    return sum(sizes.values()) + again
