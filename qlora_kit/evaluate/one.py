"""All that is measured of one model, meant to be called in a process of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.evaluate.cost import Cost, once_used, open_measured
from qlora_kit.evaluate.divergence import Divergence, compare_to_recorded, record_logprobs
from qlora_kit.evaluate.evaluate import (
    PERPLEXITY_BATCH_SIZE,
    ModelEvaluation,
    evaluate_model,
    evaluation_sequences,
    window_size,
)
from qlora_kit.evaluate.reference import Reference
from qlora_kit.evaluate.speed import SpeedPlan
from qlora_kit.report.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from qlora_kit.data.prepare import Part
    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.recipe import DataSpec, EvaluateSpec, ModelSpec
    from qlora_kit.runtime.protocol import Runtime


def silent() -> Reporter:
    return SILENT


@dataclass(frozen=True)
class Task:
    """What is measured, alike for every model; all of it can be sent to another process.

    `scratch` is where the first model's predictions are kept; `make_reporter` is called in the
    process that measures.
    """

    evaluate: EvaluateSpec
    data: DataSpec
    scratch: Path
    max_tokens: int
    model: ModelSpec | None = None
    speed: SpeedPlan | None = field(default_factory=SpeedPlan)
    force: bool = False
    make_reporter: Callable[[], Reporter] = silent


@dataclass(frozen=True)
class Measurement:
    """One model. `divergence` is None of the first, and where `refused` says why there is none;
    `notes` what to know when the figures are read beside the others', those of `cost` included.
    """

    name: str
    cost: Cost
    evaluation: ModelEvaluation
    divergence: Divergence | None = None
    refused: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """One level: what it takes stands beside what it is worth."""
        values = asdict(self)
        del values["cost"]
        return {"name": self.name, **self.cost.as_dict(), **values}


def measure_one(name: str, task: Task, is_reference: bool) -> Measurement:
    """Open a model, time it, and compare it with the record that the reference left.

    Raises:
        QloraKitError: it cannot be opened or measured.
    """
    reporter = task.make_reporter()
    runtime, cost = open_measured(name, task.model, task.force, task.speed, reporter)
    part = _held_out(runtime, task)
    measured = evaluate_model(runtime, part, task.evaluate, task.data, reporter)
    divergence, refused, notes = _compared(runtime, part, task, is_reference, reporter)
    cost = once_used(cost, runtime)
    runtime.close()
    return Measurement(
        name=name,
        cost=cost,
        evaluation=measured,
        divergence=divergence,
        refused=refused,
        notes=(*cost.notes, *notes),
    )


def _held_out(runtime: Runtime, task: Task) -> Part:
    from qlora_kit.data.prepare import prepare_eval

    return prepare_eval(task.data, runtime.tokenizer, runtime.stop_ids)


def _compared(
    runtime: Runtime, part: Part, task: Task, is_reference: bool, reporter: Reporter
) -> tuple[Divergence | None, str, tuple[str, ...]]:
    """(divergence from the reference, why there is none, notes)"""
    sequences = evaluation_sequences(part, runtime.tokenizer, task.data)
    windows: dict[str, Any] = {
        "window_tokens": window_size(runtime.context_tokens, task.evaluate, task.data),
        "stride_tokens": task.evaluate.stride_tokens,
        "max_tokens": task.max_tokens,
    }
    if is_reference:
        num_tokens = min(task.max_tokens, sum(one.num_supervised for one in sequences))
        with reporter.progress(f"{runtime.name}: recording", num_tokens) as progress:
            recorded = record_logprobs(
                runtime,
                sequences,
                task.scratch,
                batch_size=PERPLEXITY_BATCH_SIZE,
                progress=progress,
                **windows,
            )
        Reference.of(runtime, recorded).save(task.scratch)
        return None, "", ()
    reference = Reference.load(task.scratch)
    refused = reference.difference_from(runtime.tokenizer, runtime.vocab_size)
    if refused is not None:
        note = "its perplexity is per token of its own, and not comparable with the others'"
        return None, refused, (note,)
    recorded = reference.recorded
    with reporter.progress(f"{runtime.name}: comparing", recorded.num_tokens) as progress:
        divergence = compare_to_recorded(
            runtime,
            recorded,
            batch_size=PERPLEXITY_BATCH_SIZE,
            num_entries=reference.shared_entries(runtime.vocab_size),
            progress=progress,
        )
    return divergence, "", _other_rows(reference, sequences)


def _other_rows(reference: Reference, sequences: Sequence[TokenSequence]) -> tuple[str, ...]:
    """Where a row became other tokens than the reference made of it: another template, another
    beginning of text. Rows that were cut into windows are left out.
    """
    own = {one.origin: one.input_ids for one in sequences}
    windows = reference.recorded.windows
    cut = {origin for origin, count in Counter(one.origin for one in windows).items() if count > 1}
    for window in windows:
        ids = own.get(window.origin)
        if (
            window.origin not in cut
            and ids is not None
            and ids[: window.num_tokens] != (window.input_ids)
        ):
            return (
                f"its tokenizer or template makes other tokens of {window.origin} than that of "
                f"{reference.name}: perplexity and answers are on its own, KL on the other's",
            )
    return ()
