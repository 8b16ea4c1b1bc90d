"""What training needed beside what a plan would have said, at the end of a run."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.environment import Hardware, launcher_settings
from qlora_kit.errors import QloraKitError
from qlora_kit.model.fused.residents import Room
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.plan import Moment, foretold_training
from qlora_kit.plan.rows import worst_of
from qlora_kit.plan.trial import Taken
from qlora_kit.refusals import naming

if TYPE_CHECKING:
    from qlora_kit.recipe import Recipe
    from qlora_kit.train.batching import Batching
    from qlora_kit.train.memory import MemoryWatch
    from qlora_kit.train.train import TrainResult


@dataclass(frozen=True)
class Beside:
    """The peak of training, twice."""

    predicted: Moment
    predicted_bytes: int
    """Of what is measured: a GPU's tensors, or the whole process on a CPU."""
    measured_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "predicted_components": dict(self.predicted.components),
        }


def training_beside(
    recipe: Recipe,
    batches: Batching,
    trained: TrainResult,
    hardware: Hardware,
    memory: MemoryWatch,
) -> Beside | None:
    """None where nothing could be predicted, or nothing was measured: this process made no update.

    Held against the longest batch and the recomputing layers that training ended with.
    """
    is_gpu = hardware.device == "cuda"
    measured = (memory.device_peaks if is_gpu else memory.host_peaks).get("training")
    items = batches.longest(trained.sequences_at_a_time)
    if (
        measured is None
        or not trained.num_steps_here
        or not items
        or launcher_settings().is_sharded
    ):
        return None
    shape = worst_of(items, batches).first(len(items))
    how = Taken(
        trained.num_recomputing,
        recipe.train.gradient_accumulation_steps > 1 or trained.is_divided,
        Room(sys.maxsize, True) if trained.is_reordered else Room(trained.resident_bytes),
        trained.offloads,
        trained.gives_back,
    )
    try:
        vocabulary = load_vocabulary(recipe.model)
        held = memory.host_at_start
        predicted = foretold_training(recipe, vocabulary, hardware, batches, shape, how, held)
    except QloraKitError:
        return None
    total = predicted.tensor_bytes if is_gpu else predicted.num_bytes
    return Beside(predicted, total, measured)


def note(found: Beside, log: Path, step: int) -> None:
    """A line of log.jsonl."""
    line = {"step": step, **found.as_dict()}
    with naming(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
