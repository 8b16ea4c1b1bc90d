"""From a recipe to what it will need: the builder of this package. No weights are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.prepare import Part
from qlora_kit.environment import Hardware
from qlora_kit.errors import ModelError
from qlora_kit.evaluate.evaluate import PERPLEXITY_BATCH_SIZE
from qlora_kit.memory.kept import Kept
from qlora_kit.memory.optimizer import checkpoint_bytes, state_bytes
from qlora_kit.memory.process import resident_bytes
from qlora_kit.memory.ways import largest_quantized
from qlora_kit.model.fused.residents import Room
from qlora_kit.model.qat.attach import refuse_unaware
from qlora_kit.model.reason import reason_of
from qlora_kit.model.skeleton import build_skeleton, load_config
from qlora_kit.model.vocabulary import load_vocabulary
from qlora_kit.plan.calibration import Calibration, calibrate, recalled
from qlora_kit.plan.choice import Choice, choice_of
from qlora_kit.plan.rows import WorstBatch, longest_possible, train_rows, worst_batch
from qlora_kit.plan.shape import Shape
from qlora_kit.plan.trial import HOLES, ImaginedTraining, Peak, Taken
from qlora_kit.runtime.batches import BATCH_TOKENS, LOGITS_BYTES
from qlora_kit.train.arguments import optimizer_for, resolve_training_dtypes
from qlora_kit.train.batching import foreseen_batches
from qlora_kit.train.cadence import is_saved_beside, saves_on_its_way
from qlora_kit.train.loader import lengths_of
from qlora_kit.train.product_choice import may_stay
from qlora_kit.train.shortcuts import SWITCHES

if TYPE_CHECKING:
    from qlora_kit.model.vocabulary import Vocabulary
    from qlora_kit.plan.effort import Effort
    from qlora_kit.recipe import Recipe, TrainSpec
    from qlora_kit.train.batching import Batching

OPTIMIZER, FRAMEWORK = "optimizer", "framework"
IN_FLIGHT, SAVED = "a weight on its way", "a checkpoint on its way"

_GIB, _MIB = 2**30, 2**20
# What training adds to interpreter and libraries as they are before there is a model, tensors and
# the holes that they leave apart: docs/memory.md, "Predicted and measured".
_ADDED_BYTES = 45 * _MIB
# Context and kernels of a GPU: a guess.
_CONTEXT_BYTES = 700 * _MIB
# Of each number of a weight while it is quantized (a CPU does it in float32), or just moved.
_BYTES_IN_FLIGHT = {"cpu": 14, "cuda": 4}

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
        return self.bytes_beside_framework - self.components.get(HOLES, 0)

    @property
    def bytes_beside_framework(self) -> int:
        """Tensors, and the holes that they leave."""
        return self.num_bytes - self.components.get(FRAMEWORK, 0)


@dataclass(frozen=True)
class Plan:
    """What one device will need."""

    hardware: Hardware
    compute_dtype: str
    precision: str
    worst: WorstBatch
    """The batch that needs most."""
    num_layers: int
    """That can recompute."""
    kept: Kept
    """What forward passes keep for the backward pass."""
    choice: Choice
    """What training would choose."""
    moments: tuple[Moment, ...]
    budget_bytes: int
    tokens_per_second: float | None = None
    """Of one device, on the batch that needs most; None where nothing is calibrated."""
    seconds: float | None = None
    """Of training, by that rate; None where it is not known how many tokens there are."""
    memory_budget: str = "auto"
    """Of the recipe: what training keeps to, where that is less than there is."""

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
            "worst_batch": asdict(self.worst),
            "num_layers": self.num_layers,
            "num_recomputing": self.choice.way.num_recomputing,
            "sequences_at_a_time": self.choice.way.at_a_time,
            "offloads": self.choice.way.offloads,
            "resident_bytes": self.choice.stays.num_bytes,
            "residents_are_reordered": self.choice.stays.is_for_reordered,
            "moments": {
                one.name: {"total_bytes": one.num_bytes, "bytes": dict(one.components)}
                for one in self.moments
            },
            "peak_bytes": self.peak.num_bytes,
            "budget_bytes": self.budget_bytes,
            "memory_budget": self.memory_budget,
            "fits": self.fits,
            "tokens_per_second": self.tokens_per_second,
            "training_seconds": self.seconds,
        }


class Planner:
    """Plans for one device of a machine: of a recipe, and of what becomes of it by changes."""

    def __init__(self, vocabulary: Vocabulary, hardware: Hardware, budget_bytes: int):
        """On a CPU interpreter and libraries are taken to be what this process holds now."""
        self.vocabulary = vocabulary
        self.hardware = hardware
        self.budget_bytes = budget_bytes
        self.held_bytes = resident_bytes()
        self._imagined: dict[str, ImaginedTraining] = {}

    def plan(self, recipe: Recipe, train: Part | None = None) -> Plan:
        """What a recipe needs.

        Args:
            train: the rows; unset: every row is max_length tokens, all supervised.

        Raises:
            ModelError, AdapterError: the recipe does not suit the model, or holds what cannot be
                foretold.
            HardwareError: nothing fits train.memory_budget.
        """
        hardware = self.hardware
        recipe = recipe.with_optimizer(optimizer_for(hardware.device).name)
        with _told_apart(recipe):
            imagined = self._model_of(recipe)
            calibration = recalled(hardware, imagined.precision)
            framework = framework_bytes(hardware, calibration, self.held_bytes)
            batches = self._batches(recipe, imagined, train)
            worst = worst_batch(recipe, batches, is_possible=train is None)
            choice = choice_of(imagined, recipe.train, worst, self.budget_bytes, framework)
            how = _taken(recipe, choice, len(worst.items))
            moments = (
                _loading(imagined, framework),
                _training(
                    imagined, recipe, framework, batches, worst.first(choice.way.at_a_time), how
                ),
                *_evaluation(imagined, recipe, framework, batches, choice.stays),
            )
            rate = None
            if calibration is not None:
                accumulation = recipe.train.gradient_accumulation_steps
                rate = self._rate(imagined, worst, choice, calibration, accumulation)
        return Plan(
            hardware=hardware,
            compute_dtype=str(imagined.compute_dtype).removeprefix("torch."),
            precision=imagined.precision,
            worst=worst,
            num_layers=imagined.num_layers,
            kept=imagined.kept,
            choice=choice,
            moments=moments,
            budget_bytes=self.budget_bytes,
            tokens_per_second=rate,
            seconds=None if rate is None else _seconds_to_train(recipe, train, worst, rate),
            memory_budget=recipe.train.memory_budget,
        )

    def calibrate(self, precision: str) -> Calibration:
        """Measure this machine, and keep what was found.

        Raises:
            HardwareError: the training run that it takes failed.
        """
        return calibrate(self.hardware, precision, self._small_plan)

    def _small_plan(self, recipe: Recipe) -> tuple[Plan, Effort]:
        vocabulary = load_vocabulary(recipe.model)
        planner = Planner(vocabulary, self.hardware, self.budget_bytes)
        plan = planner.plan(recipe, train_rows(recipe, vocabulary))
        shape = plan.worst.first(len(plan.worst.items))
        return plan, planner._model_of(recipe).effort(shape, 0)

    def _rate(
        self,
        imagined: ImaginedTraining,
        worst: WorstBatch,
        choice: Choice,
        calibration: Calibration,
        accumulation: int,
    ) -> float:
        """Tokens a second."""
        way = choice.way
        shape = worst.first(way.at_a_time)
        num_micro_batches = accumulation * -(-len(worst.items) // way.at_a_time)
        effort = imagined.effort(shape, way.num_recomputing, num_micro_batches)
        return sum(map(sum, shape.rows)) / calibration.seconds(effort)

    def _batches(self, recipe: Recipe, imagined: ImaginedTraining, train: Part | None) -> Batching:
        pad = self.vocabulary.tokenizer.pad_token_id
        assert isinstance(pad, int)
        part = Part.empty() if train is None else train
        where = (self.hardware, imagined.compute_dtype)
        return foreseen_batches(imagined.causal, part, recipe.data, pad, *where)

    def _model_of(self, recipe: Recipe) -> ImaginedTraining:
        """The same one for recipes that differ in batches, optimizer and the like alone."""
        train = recipe.train
        shortcuts = [getattr(train, name) for name in SWITCHES]
        products = (train.use_onednn, may_stay(train))
        key = repr(
            (recipe.model, recipe.quantization, recipe.lora, shortcuts, products, train.precision)
        )
        if recipe.quantization_aware is not None:
            merged, compares = recipe.export.merge_options.dtype, recipe.evaluate.baseline
            key += repr((recipe.quantization_aware, merged, compares))
        if key not in self._imagined:
            self._imagined[key] = _imagined(recipe, self.vocabulary, self.hardware)
        return self._imagined[key]


def foretold_training(
    recipe: Recipe,
    vocabulary: Vocabulary,
    hardware: Hardware,
    batches: Batching,
    shape: Shape,
    how: Taken,
    held_bytes: int,
) -> Moment:
    """Of training alone, where it is known what is trained on and how.

    Args:
        held_bytes: in memory before there was a model.

    Raises:
        ModelError: the recipe holds what cannot be foretold.
    """
    with _told_apart(recipe):
        imagined = _imagined(recipe, vocabulary, hardware)
        calibration = recalled(hardware, imagined.precision)
        framework = framework_bytes(hardware, calibration, held_bytes)
        return _training(imagined, recipe, framework, batches, shape, how)


def framework_bytes(hardware: Hardware, calibration: Calibration | None, held_bytes: int) -> int:
    """Of a process that trains, tensors and the holes that they leave apart.

    As calibrated, else what is held without a model and what training adds to that: together 795
    MiB on one machine and 910 on another, of the same libraries. Of a GPU what its context takes.
    """
    if calibration is not None:
        return calibration.framework_bytes
    return held_bytes + _ADDED_BYTES if hardware.device == "cpu" else _CONTEXT_BYTES


def _seconds_to_train(
    recipe: Recipe, train: Part | None, worst: WorstBatch, rate: float
) -> float | None:
    """None where rows are not read, and the recipe does not say how many updates there are."""
    spec = recipe.train
    if train is not None and train.stream is None and spec.max_steps is None:
        num_tokens = int(lengths_of(train.sequences).sum())
        return spec.num_train_epochs * num_tokens / rate
    if spec.max_steps is None:
        return None
    return spec.max_steps * spec.gradient_accumulation_steps * worst.num_tokens / rate


@contextmanager
def _told_apart(recipe: Recipe) -> Iterator[None]:
    """What a trial cannot do is said to be the model's, and not a fault of the recipe."""
    try:
        yield
    except _BEYOND_A_TRIAL as error:
        raise ModelError(
            f"{recipe.model.name_or_path} cannot be tried on tensors without numbers, so what it "
            f"needs is not known ({type(error).__name__}: {reason_of(error)})."
        ) from error


def _imagined(
    recipe: Recipe, vocabulary: Vocabulary, hardware: Hardware, is_quick: bool = True
) -> ImaginedTraining:
    spec = recipe.model
    dtypes = resolve_training_dtypes(recipe, hardware)
    config = load_config(vocabulary.source.folder, spec.trust_remote_code)
    skeleton = build_skeleton(config, spec.trust_remote_code)
    if spec.attn_implementation != "auto":
        skeleton.model.set_attn_implementation(spec.attn_implementation)
    dtype: torch.dtype = getattr(torch, dtypes.compute)
    if recipe.quantization_aware is not None:
        refuse_unaware(skeleton, recipe.quantization_aware)
    return ImaginedTraining(
        recipe, skeleton, vocabulary, dtype, dtypes.precision, hardware.device, is_quick
    )


def _taken(recipe: Recipe, choice: Choice, num_sequences: int) -> Taken:
    way = choice.way
    return Taken(
        way.num_recomputing,
        is_accumulated=recipe.train.gradient_accumulation_steps > 1
        or way.at_a_time < num_sequences,
        stays=choice.stays,
        offloads=way.offloads,
        gives_back=recipe.train.memory_budget_bytes is not None
        and way.gives_up_speed(num_sequences),
    )


def _training(
    imagined: ImaginedTraining,
    recipe: Recipe,
    framework: int,
    batches: Batching,
    shape: Shape,
    how: Taken,
) -> Moment:
    around = _around(imagined, recipe, framework)
    if saved := _saved_beside(imagined, recipe.train, batches):
        around[SAVED] = saved
    return Moment("training", {**imagined.step(shape, how), **around})


def _saved_beside(imagined: ImaginedTraining, spec: TrainSpec, batches: Batching) -> int:
    """What is copied of a checkpoint that is written while updates are made, on a CPU; on a GPU it
    is in the host's memory.
    """
    if imagined.device != "cpu" or not is_saved_beside(spec, imagined.device):
        return 0
    num_items = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    if not saves_on_its_way(spec, batches.updates_per_pass(num_items)):
        return 0
    return checkpoint_bytes(spec.optim, [one.numel() for one in imagined.trained])


def _around(imagined: ImaginedTraining, recipe: Recipe, framework: int) -> dict[str, int]:
    """What is there beside the tensors of a step."""
    shapes = [one.numel() for one in imagined.trained]
    return {
        OPTIMIZER: state_bytes(recipe.train.optim, shapes),
        FRAMEWORK: framework,
    }


def _loading(imagined: ImaginedTraining, framework: int) -> Moment:
    return Moment(
        "loading",
        {
            **imagined.weights,
            IN_FLIGHT: largest_quantized(imagined.model) * _BYTES_IN_FLIGHT[imagined.device],
            FRAMEWORK: framework,
        },
    )


def _evaluation(
    imagined: ImaginedTraining,
    recipe: Recipe,
    framework: int,
    batches: Batching,
    stays: Room,
) -> list[Moment]:
    """Of the held-out loss, the perplexity and the answers whichever needs most."""
    if not recipe.data.has_eval_rows:
        return []
    length = recipe.data.max_length
    peaks: list[Peak] = []
    if recipe.train.eval_strategy != "no":
        num = recipe.train.per_device_eval_batch_size
        largest = longest_possible(recipe, batches, num).first(num)
        peaks.append(imagined.held_out_loss(largest, stays))
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
    return [Moment("evaluation", {**worst, **_around(imagined, recipe, framework)})]
