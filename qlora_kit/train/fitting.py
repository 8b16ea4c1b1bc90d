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


def divisor_of(num_sequences: int, at_a_time: int) -> int:
    """How often a micro-batch is halved into parts, so that no part has more sequences."""
    divisor = 1
    while -(-num_sequences // divisor) > at_a_time:
        divisor *= 2
    return divisor


def sequences_before(progress: Progress | None, spec: TrainSpec) -> int | None:
    """As many as the attempts before took at a time, of the same recipe; None: nothing is known."""
    if progress is None or not _is_of(progress.fitted, spec):
        return None
    return progress.fitted[_MICRO_BATCH]


def fitted(trainer: QloraTrainer, spec: TrainSpec) -> dict[str, int | None]:
    """What `put_back_what_fits` goes by, with what the recipe asked for; empty where that fits."""
    rows = trainer.held_out.batch_size if trainer.held_out else spec.per_device_eval_batch_size
    had_to = trainer.recompute is not None and trainer.recompute.is_forced
    is_as_asked = trainer.divisor == 1 and rows == spec.per_device_eval_batch_size and not had_to
    if is_as_asked and spec.memory_budget_bytes is None:
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
    found = progress.fitted
    if not _is_of(found, spec):
        return
    size, rows = found[_MICRO_BATCH], found[_EVAL_BATCH]
    assert size is not None
    assert rows is not None
    divisor, trainer.divisor = (
        trainer.divisor,
        max(trainer.divisor, divisor_of(spec.per_device_train_batch_size, size)),
    )
    if found.get(_RECOMPUTE) and trainer.recompute is not None:
        trainer.recompute.all()
        reporter.say("memory    all layers recompute from the start: it ran out before otherwise")
    told = [f"{size} of {spec.per_device_train_batch_size} sequences"] * (trainer.divisor > divisor)
    if trainer.held_out is not None and rows < trainer.held_out.batch_size:
        trainer.held_out.batch_size = rows
        told.append(f"{rows} of {spec.per_device_eval_batch_size} held-out rows")
    if told:
        reporter.say(
            f"memory    {' and '.join(told)} at a time from the start: memory ran out with more "
            "before the checkpoint"
        )


def _is_of(found: dict[str, int | None], spec: TrainSpec) -> bool:
    """Whether this was found for a recipe that asks for the same."""
    return bool(found) and all(found.get(name) == value for name, value in _asked(spec).items())


def _asked(spec: TrainSpec) -> dict[str, int | None]:
    return {
        "per_device_train_batch_size": spec.per_device_train_batch_size,
        "per_device_eval_batch_size": spec.per_device_eval_batch_size,
        "max_memory_mib": spec.max_memory_mib,
        "memory_budget_bytes": spec.memory_budget_bytes,
    }
