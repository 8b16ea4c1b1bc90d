"""What was found to fit the memory, kept in a checkpoint so that no attempt finds it anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.recipe import TrainSpec
    from qlora_kit.report.reporter import Reporter
    from qlora_kit.train.snapshot import Progress
    from qlora_kit.train.trainer import QloraTrainer

_MICRO_BATCH = "sequences_at_a_time"
_EVAL_BATCH = "eval_rows_at_a_time"
_RECOMPUTE = "all_layers_recompute"


def fitted(trainer: QloraTrainer, spec: TrainSpec) -> dict[str, int | None]:
    """What `put_back_what_fits` goes by, with what the recipe asked for; empty where that fits."""
    rows = trainer.held_out.batch_size if trainer.held_out else spec.per_device_eval_batch_size
    had_to = trainer.recompute is not None and trainer.recompute.is_forced
    if trainer.divisor == 1 and rows == spec.per_device_eval_batch_size and not had_to:
        return {}
    return {
        **_asked(spec),
        _MICRO_BATCH: trainer.micro_batch,
        _EVAL_BATCH: rows,
        _RECOMPUTE: int(had_to),
    }


def put_back_what_fits(
    trainer: QloraTrainer, progress: Progress, spec: TrainSpec, reporter: Reporter
) -> None:
    """Begin with what the attempts before came down to, unless the recipe now asks for other
    batches or another limit, which are then tried.
    """
    found, asked = progress.fitted, _asked(spec)
    if not found or any(found.get(name) != value for name, value in asked.items()):
        return
    size, rows = found[_MICRO_BATCH], found[_EVAL_BATCH]
    assert size is not None
    assert rows is not None
    while trainer.micro_batch > size:
        trainer.divisor *= 2
    if found.get(_RECOMPUTE) and trainer.recompute is not None:
        trainer.recompute.all()
        reporter.say("memory    all layers recompute from the start: it ran out before otherwise")
    told = [f"{size} of {spec.per_device_train_batch_size} sequences"] * (trainer.divisor > 1)
    if trainer.held_out is not None and rows < spec.per_device_eval_batch_size:
        trainer.held_out.batch_size = rows
        told.append(f"{rows} of {spec.per_device_eval_batch_size} held-out rows")
    if told:
        reporter.say(
            f"memory    {' and '.join(told)} at a time from the start: memory ran out with more "
            "before the checkpoint"
        )


def _asked(spec: TrainSpec) -> dict[str, int | None]:
    return {
        "per_device_train_batch_size": spec.per_device_train_batch_size,
        "per_device_eval_batch_size": spec.per_device_eval_batch_size,
        "max_memory_mib": spec.max_memory_mib,
    }
