"""From a recipe to what it will need: the builder of this package. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.environment import Hardware, resolve_compute_dtype
from qlora_kit.errors import ModelError
from qlora_kit.evaluate.evaluate import PERPLEXITY_BATCH_SIZE
from qlora_kit.model.reason import reason_of
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.memory.optimizer import state_bytes
from qlora_kit.plan.trial import ImaginedTraining, Peak, Shape
from qlora_kit.runtime.batches import BATCH_TOKENS, LOGITS_BYTES
from qlora_kit.train.arguments import resolve_precision

if TYPE_CHECKING:
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.recipe import Recipe

OPTIMIZER, FRAMEWORK = "optimizer", "framework"
IN_FLIGHT = "a weight on its way"

_GIB, _MIB = 2**30, 2**20
FRAMEWORK_BYTES = {"cpu": 1080 * _MIB, "cuda": 700 * _MIB}
"""Of a process that trains, tensors apart: interpreter and libraries; context and kernels of a GPU.
Measured with torch 2.14 on a CPU; a guess for GPUs."""
# Of each number of a weight while it is quantized (a CPU does it in float32), or just moved.
_BYTES_IN_FLIGHT = {"cpu": 14, "cuda": 4}
# What `gradient_checkpointing: auto` leaves to others; see train/recompute.py.
_SHARE = {"cpu": 0.6, "cuda": 0.85}
_LEFT_BYTES = 512 * _MIB

# What operations on tensors without numbers raise where code asks for the numbers.
_BEYOND_A_TRIAL = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
)


@dataclass(frozen=True)
class Moment:
    """What is needed at the worst point of a phase, in bytes by component."""

    name: str
    components: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def tensor_bytes(self) -> int:
        return self.num_bytes - self.components.get(FRAMEWORK, 0)


@dataclass(frozen=True)
class Plan:
    """What one device will need."""

    hardware: Hardware
    compute_dtype: str
    precision: str
    shape: Shape
    """Of the batch that needs most."""
    num_layers: int
    """That can recompute."""
    num_recomputing: int
    moments: tuple[Moment, ...]
    budget_bytes: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda one: one.num_bytes)

    @property
    def fits(self) -> bool:
        return self.peak.num_bytes <= self.budget_bytes

    def moment(self, name: str) -> Moment:
        return next(one for one in self.moments if one.name == name)

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.hardware.device_name,
            "num_devices": max(self.hardware.num_devices, 1),
            "compute_dtype": self.compute_dtype,
            "precision": self.precision,
            "worst_batch": vars(self.shape),
            "num_layers": self.num_layers,
            "num_recomputing": self.num_recomputing,
            "moments": {
                one.name: {"total_bytes": one.num_bytes, "bytes": dict(one.components)}
                for one in self.moments
            },
            "peak_bytes": self.peak.num_bytes,
            "budget_bytes": self.budget_bytes,
            "fits": self.fits,
        }


class Planner:
    """Plans for one device of a machine: of a recipe, and of what becomes of it by changes."""

    def __init__(self, vocabulary: Vocabulary, hardware: Hardware, budget_bytes: int):
        self.vocabulary = vocabulary
        self.hardware = hardware
        self.budget_bytes = budget_bytes
        self._imagined: dict[str, ImaginedTraining] = {}

    def plan(self, recipe: Recipe, shape: Shape | None = None) -> Plan:
        """What a recipe needs.

        Args:
            shape: of the longest batch; unset: every row is max_length tokens, all supervised.

        Raises:
            ModelError, AdapterError: the recipe does not suit the model, or holds what cannot be
                foretold.
        """
        hardware = self.hardware
        with _told_apart(recipe):
            imagined = self._model_of(recipe)
            shape = shape or longest_possible(recipe)
            count = _num_recomputing(imagined, recipe, hardware, shape, self.budget_bytes)
            moments = (
                _loading(imagined, hardware),
                _training(imagined, recipe, hardware, shape, count),
                *_evaluation(imagined, recipe, hardware),
            )
        return Plan(
            hardware=hardware,
            compute_dtype=str(imagined.compute_dtype).removeprefix("torch."),
            precision=imagined.precision,
            shape=shape,
            num_layers=imagined.num_layers,
            num_recomputing=count,
            moments=moments,
            budget_bytes=self.budget_bytes,
        )

    def _model_of(self, recipe: Recipe) -> ImaginedTraining:
        """The same one for recipes that differ in batches, optimizer and the like alone."""
        train = recipe.train
        shortcuts = (train.fused_loss, train.fused_lora, train.fused_mlp, train.fused_norm)
        key = repr((recipe.model, recipe.quantization, recipe.lora, shortcuts, train.precision))
        if key not in self._imagined:
            self._imagined[key] = _imagined(recipe, self.vocabulary, self.hardware)
        return self._imagined[key]


def foretold_training(
    recipe: Recipe,
    vocabulary: Vocabulary,
    hardware: Hardware,
    shape: Shape,
    num_recomputing: int,
) -> Moment:
    """Of training alone, where it is known what is trained on and which layers recompute.

    Raises:
        ModelError: the recipe holds what cannot be foretold.
    """
    with _told_apart(recipe):
        imagined = _imagined(recipe, vocabulary, hardware)
        return _training(imagined, recipe, hardware, shape, num_recomputing)


@contextmanager
def _told_apart(recipe: Recipe) -> Iterator[None]:
    """What a trial cannot do is said to be the model's, and not a fault of the recipe."""
    if recipe.quantization_aware is not None:
        raise ModelError("plan does not know what quantization_aware takes.")
    try:
        yield
    except _BEYOND_A_TRIAL as error:
        raise ModelError(
            f"{recipe.model.name_or_path} cannot be tried on tensors without numbers, so what it "
            f"needs is not known ({type(error).__name__}: {reason_of(error)})."
        ) from error


def _imagined(recipe: Recipe, vocabulary: Vocabulary, hardware: Hardware) -> ImaginedTraining:
    spec = recipe.model
    compute_dtype, _ = resolve_compute_dtype(recipe.quantization.compute_dtype, hardware)
    precision = resolve_precision(recipe.train.precision, compute_dtype, hardware)
    config = load_config(vocabulary.source.folder, spec.trust_remote_code)
    skeleton = build_skeleton(config, spec.trust_remote_code)
    if spec.attn_implementation != "auto":
        skeleton.model.set_attn_implementation(spec.attn_implementation)
    dtype: torch.dtype = getattr(torch, compute_dtype)
    return ImaginedTraining(recipe, skeleton, vocabulary, dtype, precision, hardware.device)


def _training(
    imagined: ImaginedTraining, recipe: Recipe, hardware: Hardware, shape: Shape, count: int
) -> Moment:
    step = imagined.step(shape, count, recipe.train.gradient_accumulation_steps > 1)
    return Moment("training", {**step, **_around(imagined, recipe, hardware)})


def longest_possible(recipe: Recipe) -> Shape:
    """Of a batch in which no row could be longer."""
    num, length = recipe.train.per_device_train_batch_size, recipe.data.max_length
    return Shape(num, length, num * (length - 1), is_masked=num > 1 or recipe.data.packing)


def _around(imagined: ImaginedTraining, recipe: Recipe, hardware: Hardware) -> dict[str, int]:
    """What is there beside the tensors of a step."""
    shapes = [one.numel() for one in imagined.trained]
    return {
        OPTIMIZER: state_bytes(recipe.train.optim, shapes),
        FRAMEWORK: FRAMEWORK_BYTES[hardware.device],
    }


def _num_recomputing(
    imagined: ImaginedTraining, recipe: Recipe, hardware: Hardware, shape: Shape, budget: int
) -> int:
    """As the recipe says; `auto` as training decides where nothing else is in the memory."""
    asked, num_layers = recipe.train.gradient_checkpointing, imagined.num_layers
    if asked is not True and asked is not False:
        weights = sum(imagined.weights.values())
        trained = sum(one.numel() for one in imagined.trained)
        free = budget - FRAMEWORK_BYTES[hardware.device] - weights
        room = _SHARE[hardware.device] * free - 12 * trained - _LEFT_BYTES

        def kept(count: int) -> int:
            return sum(imagined.step(shape, count, is_accumulated=False).values()) - weights

        return _fewest(num_layers, kept, room)
    return num_layers if asked else 0


def _fewest(most: int, kept: Callable[[int], int], room: float) -> int:
    """The smallest count with which what is kept has room; `most` where none has.

    A recomputing layer saves about as much as another, which tells where to look.
    """
    if kept(most) > room:
        return most
    if kept(0) <= room:
        return 0
    saved = max((kept(0) - kept(most)) / most, 1.0)
    count = min(max(math.ceil((kept(0) - room) / saved), 1), most)
    while kept(count) > room:
        count += 1
    while count > 1 and kept(count - 1) <= room:
        count -= 1
    return count


def _loading(imagined: ImaginedTraining, hardware: Hardware) -> Moment:
    return Moment(
        "loading",
        {
            **imagined.weights,
            IN_FLIGHT: imagined.largest_packed * _BYTES_IN_FLIGHT[hardware.device],
            FRAMEWORK: FRAMEWORK_BYTES[hardware.device],
        },
    )


def _evaluation(imagined: ImaginedTraining, recipe: Recipe, hardware: Hardware) -> list[Moment]:
    """Of the held-out loss, the perplexity and the answers whichever needs most."""
    if not recipe.data.has_eval_rows:
        return []
    length = recipe.data.max_length
    peaks: list[Peak] = []
    if recipe.train.eval_strategy != "no":
        num = recipe.train.per_device_eval_batch_size
        peaks.append(imagined.held_out_loss(Shape(num, length, num * (length - 1), num > 1)))
    if recipe.evaluate.perplexity:
        window = recipe.evaluate.window_tokens or length
        cells = LOGITS_BYTES // (4 * imagined.num_entries)
        num = min(PERPLEXITY_BATCH_SIZE, BATCH_TOKENS // window, cells // window)
        peaks.append(imagined.scoring(max(num, 1), window))
    generate = recipe.evaluate.generate
    if generate is not None:
        peaks.append(imagined.answering(generate.batch_size, length, generate.max_new_tokens))
    if not peaks:
        return []
    worst = max(peaks, key=lambda one: sum(one.values()))
    return [Moment("evaluation", {**worst, **_around(imagined, recipe, hardware)})]
