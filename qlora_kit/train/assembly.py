"""The trainer, what watches it and what writes its checkpoints, which know each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import transformers

from qlora_kit.model.base import Base
from qlora_kit.model.qat.attach import fake_quantization_of
from qlora_kit.out_of_memory import MemoryLimit
from qlora_kit.train.arguments import training_arguments
from qlora_kit.train.batching import Batching
from qlora_kit.train.budget import Fit
from qlora_kit.train.cadence import Cadence, is_saved_beside
from qlora_kit.train.callbacks import StepCallback
from qlora_kit.train.continuation import Continuation, GoOn, MakeUp
from qlora_kit.train.fitting import put_back_what_fits
from qlora_kit.train.held_out import HeldOutLoss
from qlora_kit.train.hooks import Hooks
from qlora_kit.train.known_shortcuts import Choice
from qlora_kit.train.loader import BatchShape, MicroBatches
from qlora_kit.train.quantization import QuantizationStart
from qlora_kit.train.saving import Saver
from qlora_kit.train.snapshot import Progress
from qlora_kit.train.surroundings import Surroundings
from qlora_kit.train.trackers import Tensorboard
from qlora_kit.train.trainer import QloraTrainer
from qlora_kit.train.worst_batch import WorstBatch, what_would_help

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainerCallback

    from qlora_kit.recipe import TrainSpec


@dataclass(frozen=True)
class Course:
    """All that one training goes by."""

    model: PeftModel
    base: Base
    batches: Batching
    spec: TrainSpec
    around: Surroundings
    continuation: Continuation | None
    shape: BatchShape
    num_updates: int
    limit: MemoryLimit
    fit: Fit
    choice: Choice

    @property
    def start(self) -> int:
        """Updates made before."""
        return self.continuation.progress.update if self.continuation else 0

    @property
    def updates_per_pass(self) -> int:
        return self.batches.updates_per_pass(self.shape.items_per_update) or self.num_updates


def assembled(course: Course) -> tuple[QloraTrainer, StepCallback, Cadence]:
    """Ready to train."""
    spec, around, continuation = course.spec, course.around, course.continuation
    saver, batches = _saver_and_batches(course)
    trainer = _trainer(course, saver, batches)
    if continuation is not None:
        put_back_what_fits(trainer, continuation.progress, spec, around.reporter)
    step = StepCallback(
        around.run.log,
        around.memory,
        around.reporter,
        course.updates_per_pass,
        around.processes,
        around.laps,
    )
    cadence = Cadence(
        spec, course.updates_per_pass, course.num_updates, around.requests, trainer.hooks
    )
    saver.trainer = step.trainer = trainer
    saver.step = step
    trainer.remove_callback(transformers.PrinterCallback)
    for callback in _callbacks(course, trainer, step, cadence):
        trainer.add_callback(callback)
    return trainer, step, cadence


def _saver_and_batches(course: Course) -> tuple[Saver, MicroBatches]:
    """Which share the place in a stream of rows."""
    spec, shape, batches = course.spec, course.shape, course.batches
    begin = course.continuation.place if course.continuation else None
    items = batches.items(spec, shape.items_per_update, begin)
    is_beside = is_saved_beside(spec, course.around.hardware.device)
    saver = Saver(
        course.around, shape, course.num_updates, spec, course.choice, items, is_beside=is_beside
    )
    return saver, MicroBatches(items, batches.collator, shape, course.start, course.num_updates)


def _trainer(course: Course, saver: Saver, batches: MicroBatches) -> QloraTrainer:
    spec, around, fit = course.spec, course.around, course.fit
    return QloraTrainer(
        model=course.model,
        args=training_arguments(
            spec,
            around.precision,
            around.hardware,
            around.run.folder,
            around.run.folder.name,
            num_updates=course.num_updates,
            accumulation=course.shape.accumulation,
        ),
        eval_dataset=course.batches.held_out or None,
        batches=batches,
        collator=course.batches.collator,
        held_out=_held_out_loss(course),
        hooks=_hooks(course, saver),
        recompute=fit.recompute,
        divisor=fit.divisor,
        progress=course.continuation.progress if course.continuation else Progress(),
        loraplus_lr_ratio=spec.loraplus_lr_ratio,
    )


def _held_out_loss(course: Course) -> HeldOutLoss | None:
    if not course.batches.held_out:
        return None
    requests = course.around.requests
    return HeldOutLoss(
        course.batches.held_out,
        course.batches.collator,
        course.fit.held_out_rows or course.spec.per_device_eval_batch_size,
        course.around.processes,
        course.limit,
        stop_signal=lambda: requests.stop_signal,
    )


def _hooks(course: Course, saver: Saver) -> Hooks:
    around, base, spec = course.around, course.base, course.spec
    return Hooks(
        can_save=saver.can_save,
        save=saver.save,
        save_last=saver.save_last,
        settle=lambda: around.processes.on_main(saver.settle),
        settled=saver.settled,
        has_failed=saver.has_failed,
        keep_last_good=saver.keep_last_good,
        warn=around.reporter.warn,
        gathered=around.processes.gathered,
        limit=course.limit,
        out_of_memory=lambda found, size: what_would_help(found, size, base, spec, around),
    )


def _callbacks(
    course: Course, trainer: QloraTrainer, step: StepCallback, cadence: Cadence
) -> Iterator[TrainerCallback]:
    """In the order of their turns: the worst batch is tried, then what was saved is put back."""
    spec, around, continuation = course.spec, course.around, course.continuation
    if "tensorboard" in spec.report_to and around.processes.is_main:
        yield Tensorboard(around.run.folder, course.start, around.reporter.warn)
    yield WorstBatch(trainer, course.batches, spec, around)
    yield GoOn(trainer, continuation, around.processes, around.run.log, around.adapter_files)
    quantization = fake_quantization_of(course.model)
    if quantization is not None:
        yield QuantizationStart(quantization, course.num_updates)
    yield step
    yield cadence
    yield MakeUp(trainer)
