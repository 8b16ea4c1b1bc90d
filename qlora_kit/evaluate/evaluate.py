"""The builder of this package: a model and the eval rows in, figures out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qlora_kit.data.examples import Conversation, Example, PlainText, PromptCompletion
from qlora_kit.data.render import Prompt, render, render_prompt
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.evaluate.generation import (
    Answer,
    count_exact,
    exact_match,
    generate_answers,
)
from qlora_kit.evaluate.metrics import measure_metrics
from qlora_kit.evaluate.perplexity import Perplexity, measure_perplexity
from qlora_kit.report.reporter import SILENT, Reporter
from qlora_kit.runtime.protocol import Runtime
from qlora_kit.runtime.transformers import TransformersRuntime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.prepare import Part
    from qlora_kit.recipe import DataSpec, EvaluateSpec

NUM_SAMPLES = 5
MAX_QUESTION_CHARACTERS = 200
PERPLEXITY_BATCH_SIZE = 64
"""Rows at most; `windows.BATCH_TOKENS` and `windows.LOGITS_BYTES` bound long ones."""


@dataclass(frozen=True)
class Sample:
    """One answer to show: the end of the question, what was wanted, what came."""

    origin: str
    question: str
    reference: str
    answer: str
    is_exact: bool


@dataclass(frozen=True)
class ModelEvaluation:
    """The figures of one model; those that were not asked for are None, or not in `metrics`.

    `num_rows` is how many prompts were answered; of those, `num_exact` as the reference has it,
    `num_unstopped` ran into the limit of new tokens, and `num_too_long` left no room to answer.
    """

    name: str
    perplexity: Perplexity | None
    exact_match: float | None
    num_rows: int
    num_exact: int
    num_unstopped: int
    num_too_long: int
    samples: tuple[Sample, ...]
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Besides exact match; see `metrics.measure_metrics`."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SideBySide:
    """The base, which is the same model with its adapter off, and the tuned model."""

    base: ModelEvaluation | None
    tuned: ModelEvaluation

    def as_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.as_dict() if self.base else None,
            "tuned": self.tuned.as_dict(),
        }


def evaluate_model(
    runtime: Runtime,
    part: Part,
    spec: EvaluateSpec,
    data: DataSpec,
    reporter: Reporter = SILENT,
) -> ModelEvaluation:
    """Measure one model on the eval rows.

    Raises:
        ModelError: the window is longer than the model's context.
        DataError: nothing is supervised.
    """
    started = time.perf_counter()
    perplexity = None
    if spec.perplexity:
        perplexity = _perplexity(runtime, part, spec, data, reporter)
    answers: list[Answer] = []
    asks_exact = spec.generate is not None and "exact_match" in spec.generate.metrics
    samples: tuple[Sample, ...] = ()
    metrics: dict[str, float] = {}
    if spec.generate is not None:
        examples, prompts = _prompts(part, runtime.tokenizer, spec.generate.max_rows)
        if not prompts and runtime.name != "base":  # said once of the two
            reporter.warn("evaluate.generate: no eval row has an answer to compare with.")
        with reporter.progress(f"{runtime.name}: answering", len(prompts)) as progress:
            answers = generate_answers(
                runtime,
                prompts,
                max_new_tokens=spec.generate.max_new_tokens,
                batch_size=spec.generate.batch_size,
                progress=progress,
            )
        samples = _samples(examples, answers)
        if answers:
            metrics, findings = measure_metrics(answers, spec.generate.metrics)
            for finding in findings if runtime.name != "base" else ():
                reporter.warn(finding)
    return ModelEvaluation(
        name=runtime.name,
        perplexity=perplexity,
        exact_match=exact_match(answers) if answers and asks_exact else None,
        num_rows=len(answers),
        num_exact=count_exact(answers),
        num_unstopped=sum(not one.stopped and not one.too_long for one in answers),
        num_too_long=sum(one.too_long for one in answers),
        samples=samples,
        seconds=time.perf_counter() - started,
        metrics=metrics,
    )


def evaluate_side_by_side(
    tuned: TransformersRuntime,
    part: Part,
    spec: EvaluateSpec,
    data: DataSpec,
    reporter: Reporter = SILENT,
) -> SideBySide:
    """Measure the model with its adapter off (unless `spec.baseline` is false) and on."""
    before = None
    if spec.baseline:
        with tuned.without_adapter("base") as base:
            before = evaluate_model(base, part, spec, data, reporter)
    tuned = replace(tuned, name="tuned")
    return SideBySide(before, evaluate_model(tuned, part, spec, data, reporter))


def evaluation_sequences(
    part: Part, tokenizer: PreTrainedTokenizerBase, data: DataSpec
) -> tuple[TokenSequence, ...]:
    """What perplexity is measured on: plain texts whole, everything else as it is trained.

    Training cuts a plain text into pieces; here a sliding window reads it through.
    """
    texts = [example for example in _kept_examples(part) if isinstance(example, PlainText)]
    cut = {example.origin for example in texts}
    kept = [sequence for sequence in part.sequences if sequence.origin not in cut]
    return (*kept, *(render(text, tokenizer, data.loss_on) for text in texts))


def _kept_examples(part: Part) -> list[Example]:
    """Without the rows that were dropped; the ledger tells which."""
    origins = {sequence.origin for sequence in part.sequences}
    return [example for example in part.examples if example.origin in origins]


def window_size(limit: int | None, spec: EvaluateSpec, data: DataSpec) -> int:
    """Tokens a model whose context is `limit` reads at once when perplexity is measured.

    Raises:
        ModelError: they exceed its context.
    """
    window = spec.window_tokens or data.max_length
    if limit is not None and window > limit:
        key = "evaluate.window_tokens" if spec.window_tokens else "data.max_length"
        option = " (--window, for a text)" if spec.window_tokens else ""
        raise ModelError(
            f"{key} is {window}, but the model's context is {limit} tokens; set {key}{option} to "
            f"{limit} or less."
        )
    return window


def _perplexity(
    runtime: Runtime,
    part: Part,
    spec: EvaluateSpec,
    data: DataSpec,
    reporter: Reporter,
) -> Perplexity:
    sequences = evaluation_sequences(part, runtime.tokenizer, data)
    num_tokens = sum(sequence.num_supervised for sequence in sequences)
    if not num_tokens:
        raise DataError("perplexity cannot be measured: the eval rows have nothing supervised.")
    with reporter.progress(f"{runtime.name}: perplexity", num_tokens) as progress:
        return measure_perplexity(
            runtime,
            sequences,
            batch_size=PERPLEXITY_BATCH_SIZE,
            window_tokens=window_size(runtime.context_tokens, spec, data),
            stride_tokens=spec.stride_tokens,
            progress=progress,
        )


def _prompts(
    part: Part, tokenizer: PreTrainedTokenizerBase, max_rows: int | None
) -> tuple[list[Example], list[Prompt]]:
    examples: list[Example] = []
    prompts: list[Prompt] = []
    for example in _kept_examples(part):
        if len(prompts) == max_rows:
            break
        prompt = render_prompt(example, tokenizer)
        if prompt is not None:
            examples.append(example)
            prompts.append(prompt)
    return examples, prompts


def _samples(examples: Sequence[Example], answers: Sequence[Answer]) -> tuple[Sample, ...]:
    pairs = zip(examples[:NUM_SAMPLES], answers[:NUM_SAMPLES], strict=True)
    return tuple(
        Sample(a.origin, _question(example), a.reference, a.text, a.is_exact)
        for example, a in pairs
    )


def _question(example: Example) -> str:
    """The end of what the model is asked."""
    if isinstance(example, Conversation):
        asked = [m.content for m in example.messages[:-1] if m.role != "assistant"]
        text = asked[-1] if asked else ""
    else:
        assert isinstance(example, PromptCompletion)
        text = example.prompt
    return text.strip()[-MAX_QUESTION_CHARACTERS:]
