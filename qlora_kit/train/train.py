"""Train an adapter, from the start or from a checkpoint: the builder of this package."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from qlora_kit.environment import launcher_settings
from qlora_kit.model.base import Base
from qlora_kit.model.by_example import attending_by_example
from qlora_kit.model.fused.residents import Residents
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.out_of_memory import MemoryLimit, limited_memory
from qlora_kit.report import narrate
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.batching import Batching
from qlora_kit.train.budget import Fit, fit_memory
from qlora_kit.train.cadence import Cadence
from qlora_kit.train.callbacks import StepCallback
from qlora_kit.train.continuation import Continuation, GoOn, MakeUp, shape_for
from qlora_kit.train.fitting import put_back_what_fits
from qlora_kit.train.held_out import GivenUp, HeldOutLoss
from qlora_kit.train.hooks import Hooks
from qlora_kit.train.loader import BatchShape, MicroBatches
from qlora_kit.train.quantization import QuantizationStart
from qlora_kit.train.recompute import able_to_recompute
from qlora_kit.train.saving import Saver
from qlora_kit.train.shortcuts import choose_shortcuts, taken
from qlora_kit.train.snapshot import Progress
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.trackers import Tensorboard, told_in_the_foreground
from qlora_kit.train.trainer import QloraTrainer
from qlora_kit.train.updates import num_update_steps
from qlora_kit.train.worst_batch import WorstBatch, what_would_help

if TYPE_CHECKING:
    from peft import PeftModel

    from qlora_kit.recipe import TrainSpec


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
    stop_signal: int | None = None
    """The signal that ended training before its time."""

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        values = {**asdict(self), "tokens_per_second": self.tokens_per_second}
        del values["stop_signal"]
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
    shortcuts = choose_shortcuts(model, spec, around.precision, is_sharded)
    laps.lap("trial of the shortcuts")
    residents = Residents()
    with (
        limited_memory(spec.max_memory_mib, hardware.device) as limit,
        taken(model, shortcuts, residents),
        attending_by_example(model.get_base_model(), batches.by_example),
        able_to_recompute(model, spec.gradient_checkpointing),
    ):
        progress_before = continuation.progress if continuation else None
        fit = fit_memory(model, batches, spec, around, is_sharded, residents, progress_before)
        laps.lap("count of what layers keep")
        narrate.computing(around.reporter, shortcuts, fit.recompute)
        trainer, step, cadence = _trainer(
            model, base, batches, spec, around, continuation, shape, num_updates, limit, fit
        )
        around.memory.phase("training")
        with (
            around.reporter.progress("training", num_updates) as progress,
            around.requests.deferred(),
            processes.noticing_loss(),
            warnings.catch_warnings(),
            told_in_the_foreground(),
            trainer.hooks.settled(),
            fit.offloading(),
        ):
            # On a CPU paged optimizers run unpaged, which is what is meant there.
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            step.progress = progress
            try:
                trainer.train()
            except GivenUp as given_up:  # before the first update
                trainer.stop_signal = given_up.signal_number
            stop_signal = (
                cadence.stop_signal or trainer.stop_signal or _late_signal(trainer, around)
            )
            trainer.hooks.settle()
        if hardware.device == "cuda":
            torch.cuda.synchronize()
    model.config.use_cache = True
    model.eval()
    return _result(trainer, step.seconds, stop_signal)


def _late_signal(trainer: QloraTrainer, around: Surroundings) -> int | None:
    """One that came while the last update was evaluated or saved, when nobody looked any more."""
    late = around.requests.stop_signal
    if late is not None and around.processes.count == 1:
        trainer.hooks.save_last()
    return late


def _result(trainer: QloraTrainer, seconds: float, stop_signal: int | None) -> TrainResult:
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
        stop_signal=stop_signal,
    )


def _trainer(
    model: PeftModel,
    base: Base,
    batches: Batching,
    spec: TrainSpec,
    around: Surroundings,
    continuation: Continuation | None,
    shape: BatchShape,
    num_updates: int,
    limit: MemoryLimit,
    fit: Fit,
) -> tuple[QloraTrainer, StepCallback, Cadence]:
    """The trainer and its callbacks, which know each other."""
    start = continuation.progress.update if continuation else 0
    begin = continuation.place if continuation else None
    items = batches.items(spec, shape.items_per_update, begin)
    updates_per_pass = batches.updates_per_pass(shape.items_per_update) or num_updates
    run, processes = around.run, around.processes
    saver = Saver(around, shape, num_updates, spec, items, is_beside=limit.data_bytes is None)
    trainer = QloraTrainer(
        model=model,
        args=training_arguments(
            spec,
            around.precision,
            around.hardware,
            run.folder,
            run.folder.name,
            num_updates=num_updates,
            accumulation=shape.accumulation,
        ),
        eval_dataset=batches.held_out or None,
        batches=MicroBatches(items, batches.collator, shape, start, num_updates),
        collator=batches.collator,
        held_out=HeldOutLoss(
            batches.held_out,
            batches.collator,
            spec.per_device_eval_batch_size,
            processes,
            limit,
            stop_signal=lambda: around.requests.stop_signal,
        )
        if batches.held_out
        else None,
        hooks=Hooks(
            can_save=saver.can_save,
            save=saver.save,
            save_last=saver.save_last,
            settle=lambda: processes.on_main(saver.settle),
            settled=saver.settled,
            has_failed=saver.has_failed,
            keep_last_good=saver.keep_last_good,
            warn=around.reporter.warn,
            gathered=processes.gathered,
            limit=limit,
            out_of_memory=lambda found, size: what_would_help(found, size, base, spec, around),
        ),
        recompute=fit.recompute,
        divisor=fit.divisor,
        progress=continuation.progress if continuation else Progress(),
        loraplus_lr_ratio=spec.loraplus_lr_ratio,
    )
    if continuation is not None:
        put_back_what_fits(trainer, continuation.progress, spec, around.reporter)
    saver.trainer = trainer
    step = StepCallback(
        run.log, around.memory, around.reporter, updates_per_pass, processes, around.laps
    )
    saver.step = step
    cadence = Cadence(spec, updates_per_pass, num_updates, around.requests, trainer.hooks)
    step.trainer = trainer
    trainer.remove_callback(transformers.PrinterCallback)
    if "tensorboard" in spec.report_to and processes.is_main:
        trainer.add_callback(Tensorboard(run.folder, start, around.reporter.warn))
    # In this order: the worst batch is tried, then what was saved is put back.
    trainer.add_callback(WorstBatch(trainer, batches, spec, around))
    trainer.add_callback(GoOn(trainer, continuation, processes, run.log, around.adapter_files))
    quantization = fake_quantization_of(model)
    if quantization is not None:
        trainer.add_callback(QuantizationStart(quantization, num_updates))
    trainer.add_callback(step)
    trainer.add_callback(cadence)
    trainer.add_callback(MakeUp(trainer))
    return trainer, step, cadence
