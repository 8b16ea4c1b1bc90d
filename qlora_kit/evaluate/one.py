"""All that is measured of one model, meant to be called in a process of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.environment import probe_hardware
from qlora_kit.evaluate.divergence import Divergence, compare_to_recorded, record_logprobs
from qlora_kit.evaluate.evaluate import (
    PERPLEXITY_BATCH_SIZE,
    ModelEvaluation,
    evaluate_model,
    evaluation_sequences,
    window_size,
)
from qlora_kit.evaluate.memory import peak_device_bytes, peak_resident_bytes, resident_bytes
from qlora_kit.evaluate.reference import Reference
from qlora_kit.evaluate.speed import Speed, SpeedPlan, measure_speed
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.open import RuntimeName, import_runtime, open_runtime, runtime_of
from qlora_kit.runtime.protocol import Footprint

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
    """One model. What was not asked for, or cannot be measured, is None.

    `parameters` are counted by the form they are stored in, `memory_bytes` is what they take once
    the model has been used. Peaks are of a process that opened this model and nothing else;
    `idle_bytes` is what it had before. `refused` says why there is no divergence; `notes` what to
    know when the figures are read beside the others'.
    """

    name: str
    runtime: RuntimeName
    footprint: Footprint
    load_seconds: float
    idle_bytes: int
    peak_bytes: int
    peak_device_bytes: int | None
    speed: Speed | None
    evaluation: ModelEvaluation
    divergence: Divergence | None = None
    refused: str = ""
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["footprint"]["num_parameters"] = self.footprint.num_parameters
        return values


def measure_one(name: str, task: Task, is_reference: bool) -> Measurement:
    """Open a model, time it, and compare it with the record that the reference left.

    Raises:
        QloraKitError: it cannot be opened or measured.
    """
    reporter = task.make_reporter()
    probe_hardware()
    import_runtime(name)
    idle = resident_bytes()
    started = time.perf_counter()
    runtime = open_runtime(name, task.model, task.force, reporter)
    load_seconds = time.perf_counter() - started
    at_first = runtime.footprint()
    speed = None
    if task.speed is not None:
        count = 2 * (task.speed.warmups + task.speed.repetitions)
        with reporter.progress(f"{name}: speed", count) as progress:
            speed = measure_speed(runtime, task.speed, progress)
    # Nothing before has read a row, so the peak is that of loading and answering.
    peak, on_device = peak_resident_bytes(), peak_device_bytes()

    part = _held_out(runtime, task)
    measured = evaluate_model(runtime, part, task.evaluate, task.data, reporter)
    divergence, refused, notes = _compared(runtime, part, task, is_reference, reporter)
    in_use = runtime.footprint()
    runtime.close()
    return Measurement(
        name=name,
        runtime=runtime_of(name),
        footprint=replace(at_first, memory_bytes=in_use.memory_bytes),
        load_seconds=load_seconds,
        idle_bytes=idle,
        peak_bytes=peak,
        peak_device_bytes=on_device,
        speed=speed,
        evaluation=measured,
        divergence=divergence,
        refused=refused,
        notes=(*_timed_shorter(speed, task.speed), *_unpacked(at_first, in_use), *notes),
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


def _timed_shorter(speed: Speed | None, plan: SpeedPlan | None) -> tuple[str, ...]:
    """A rate of reading depends on how much is read at once."""
    if speed is None or plan is None or speed.prompt_tokens == plan.prompt_tokens:
        return ()
    return (
        f"its context is too short for a prompt of {plan.prompt_tokens} tokens and the answer: "
        f"reading was timed with {speed.prompt_tokens}, and compares with the others' only loosely",
    )


def _unpacked(at_first: Footprint, in_use: Footprint) -> tuple[str, ...]:
    """Some libraries keep packed weights only until they are used."""
    if in_use.memory_bytes < 1.1 * at_first.memory_bytes:
        return ()
    return (
        f"its weights are unpacked when they are first used: "
        f"{at_first.memory_bytes / 2**20:,.1f} MiB after loading, "
        f"{in_use.memory_bytes / 2**20:,.1f} MiB then",
    )
