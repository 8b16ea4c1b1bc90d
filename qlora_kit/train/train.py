"""Train an adapter, from the start or from a checkpoint: the builder of this package."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from qlora_kit.environment import launcher_settings
from qlora_kit.memory.allocator import freed_blocks_kept, large_blocks_given_back
from qlora_kit.model.base import Base
from qlora_kit.model.blockwise_attention import MOST_TOKENS
from qlora_kit.model.by_example import attending_by_example
from qlora_kit.model.fused.products import reordered
from qlora_kit.model.fused.residents import Residents
from qlora_kit.out_of_memory import limited_memory
from qlora_kit.report import narrate
from qlora_kit.train.assembly import Course, assembled
from qlora_kit.train.batching import Batching
from qlora_kit.train.budget import fit_memory
from qlora_kit.train.continuation import Continuation, shape_for
from qlora_kit.train.held_out import GivenUp
from qlora_kit.train.known_shortcuts import known_or_tried
from qlora_kit.train.recompute import able_to_recompute
from qlora_kit.train.shortcuts import taken
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.trackers import told_in_the_foreground
from qlora_kit.train.trainer import QloraTrainer
from qlora_kit.train.trial import dtype_of
from qlora_kit.train.updates import num_update_steps

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec
    from qlora_kit.train.budget import Fit


@dataclass(frozen=True)
class TrainResult:
    """What training did."""

    num_steps: int
    first_loss: float
    last_loss: float
    num_tokens: int
    """Real tokens, without padding, counted once per pass."""
    num_padding_tokens: int
    seconds: float
    """Of training, over all attempts whose work is in the result."""
    num_recomputing: int = 0
    """Layers that did, at the end."""
    sequences_at_a_time: int = 0
    """That were trained on together, at the end."""
    is_divided: bool = False
    """Whether the recipe asks for more of them."""
    resident_bytes: int = 0
    """Of frozen weights that stayed, at the end."""
    is_reordered: bool = False
    """Whether they lay in oneDNN's layout."""
    offloads: bool = False
    """Whether what is kept waited in the host's memory."""
    gives_back: bool = False
    """Whether freed blocks went back to the system at once; see `Fit.is_tight`."""
    num_steps_here: int = 0
    """Of all, those of this process: none where a checkpoint of the last one was gone on from."""
    stop_signal: int | None = None
    """The signal that ended training before its time."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "tokens_per_second": self.tokens_per_second}
        del values["stop_signal"], values["num_steps_here"]
        return values


def train_adapter(
    model: PeftModel,
    base: Base,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    continuation: Continuation | None = None,
) -> TrainResult:
    """Train in place.

    Raises:
        TrainingError: a loss or gradient was not finite; the last good adapter is kept. Or
            quantization would set in after the last update.
        RunError: the checkpoint does not fit this model, these data or these processes.
        CheckpointError: a checkpoint could not be written.
        HardwareError: not even one sequence at a time fits the memory, or nothing fits
            train.memory_budget.
    """
    processes, hardware = around.processes, around.hardware
    transformers.set_seed(spec.seed + processes.rank)
    model.config.use_cache = False
    is_sharded = launcher_settings().is_sharded
    shape = processes.together(lambda: shape_for(spec, processes, continuation))
    num_updates = num_update_steps(batches.num_items, spec, shape.items_per_update)
    laps = around.laps
    progress_before = continuation.progress if continuation else None
    on_cpu = hardware.device == "cpu"
    longest = batches.longest_by_itself(MOST_TOKENS.get(dtype_of(around.precision), 0))
    with large_blocks_given_back(on_cpu):
        choice = known_or_tried(model, spec, around, is_sharded, progress_before, longest)
    laps.lap("trial of the shortcuts")
    residents = Residents(reorder=reordered if choice.shortcuts.reorders else None)
    with (
        limited_memory(spec.max_memory_mib, hardware.device) as limit,
        taken(model, choice.shortcuts, residents),
        attending_by_example(
            model.get_base_model(), batches.by_example, choice.shortcuts.blockwise
        ),
        able_to_recompute(model, spec.gradient_checkpointing),
    ):
        key = choice.taken_key
        with large_blocks_given_back(on_cpu):
            fit = fit_memory(
                model, batches, spec, around, is_sharded, residents, progress_before, key
            )
        laps.lap("count of what layers keep")
        is_in_16_bits = around.precision != "fp32"
        narrate.computing(around.reporter, choice.shortcuts, fit.recompute, is_in_16_bits)
        course = Course(
            model,
            base,
            batches,
            spec,
            around,
            continuation,
            shape,
            num_updates,
            limit,
            fit,
            choice,
        )
        try:
            result = _gone_through(course)
        finally:
            residents.release()
    model.config.use_cache = True
    model.eval()
    return result


def _gone_through(course: Course) -> TrainResult:
    """All updates that are left, or those until a signal comes."""
    around, fit = course.around, course.fit
    trainer, step, cadence = assembled(course)
    around.memory.phase("training")
    with (
        around.reporter.progress("training", course.num_updates) as progress,
        around.requests.deferred(),
        around.processes.noticing_loss(),
        warnings.catch_warnings(),
        told_in_the_foreground(),
        trainer.hooks.settled(),
        fit.offloading(),
        fit.giving_back(),
        freed_blocks_kept(around.hardware.device == "cpu" and not fit.is_tight),
    ):
        # On a CPU paged optimizers run unpaged, which is what is meant there.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        step.progress = progress
        try:
            trainer.train()
        except GivenUp as given_up:  # before the first update
            trainer.stop_signal = given_up.signal_number
        stop_signal = cadence.stop_signal or trainer.stop_signal or _late_signal(trainer, around)
        trainer.hooks.settle()
    if around.hardware.device == "cuda":
        torch.cuda.synchronize()
    return _result(trainer, fit, step.seconds, course.start, stop_signal)


def _late_signal(trainer: QloraTrainer, around: Surroundings) -> int | None:
    """One that came while the last update was evaluated or saved, when nobody looked any more."""
    late = around.requests.stop_signal
    if late is not None and around.processes.count == 1:
        trainer.hooks.save_last()
    return late


def _result(
    trainer: QloraTrainer, fit: Fit, seconds: float, start: int, stop_signal: int | None
) -> TrainResult:
    progress, recompute = trainer.progress, trainer.recompute
    assert progress.first_loss is not None
    assert progress.last_loss is not None
    return TrainResult(
        num_steps=progress.update,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        num_tokens=progress.num_real_tokens,
        num_padding_tokens=progress.num_padding_tokens,
        seconds=seconds,
        num_recomputing=0 if recompute is None else recompute.count,
        sequences_at_a_time=trainer.micro_batch,
        is_divided=trainer.divisor > 1,
        resident_bytes=0 if recompute is None else recompute.residents.num_bytes,
        is_reordered=recompute is not None and recompute.residents.holds_reordered,
        offloads=fit.offloads,
        gives_back=fit.is_tight,
        num_steps_here=progress.update - start,
        stop_signal=stop_signal,
    )
