"""The builder: which rows are measured, and base and tuned model side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tiny

from qlora_kit.data.prepare import Part, prepare_eval
from qlora_kit.data.render import render, render_prompt
from qlora_kit.errors import ModelError
from qlora_kit.evaluate.evaluate import (
    ModelEvaluation,
    evaluate_model,
    evaluate_side_by_side,
    window_size,
)
from qlora_kit.evaluate.generation import generate_answers
from qlora_kit.evaluate.perplexity import measure_perplexity
from qlora_kit.model.adapter import attach_adapter
from qlora_kit.model.base import Base
from qlora_kit.recipe import DataSpec, EvaluateSpec, LoraSpec
from qlora_kit.report.reporter import Reporter
from qlora_kit.runtime.forward import CausalScorer, context_tokens
from qlora_kit.runtime.transformers import TransformersRuntime

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"turn lamp {n} to {n * 10} percent"},
            {"role": "assistant", "content": f'{{"lamp":{n}}}'},
        ]
    }
    for n in range(6)
]
TEXTS = [{"text": "the quick brown fox jumps over the lazy dog " * n} for n in (1, 3)]
GENERATE = {"max_new_tokens": 6, "batch_size": 4}


class Said(Reporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def base(tiny_llama: Path) -> Base:
    return load_tiny(tiny_llama)


def alone(base: Base, name: str = "it") -> TransformersRuntime:
    return TransformersRuntime.on_base(name, base.model, base)


def held_out(base: Base, folder: Path, records: list[Any], **data: Any) -> tuple[Part, DataSpec]:
    path = folder / "held.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source = {"path": str(path)}
    spec = DataSpec(train=({"path": "other.jsonl"},), eval=(source,), **data)  # type: ignore[arg-type]
    return prepare_eval(spec, base.tokenizer, base.stop_ids), spec


def figures(evaluation: ModelEvaluation) -> dict[str, Any]:
    return {
        key: value for key, value in evaluation.as_dict().items() if key not in ("name", "seconds")
    }


def test_figures_are_those_of_the_parts(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TALKS, max_length=128)
    spec = EvaluateSpec(generate=GENERATE)  # type: ignore[arg-type]
    measured = evaluate_model(alone(base), part, spec, data)
    assert measured.perplexity == measure_perplexity(
        CausalScorer(base.model, base.tokenizer.pad_token_id),
        part.sequences,
        batch_size=64,
        window_tokens=128,
        stride_tokens=None,
    )
    prompts = [render_prompt(example, base.tokenizer) for example in part.examples]
    answers = generate_answers(
        alone(base),
        [prompt for prompt in prompts if prompt],
        max_new_tokens=6,
        batch_size=4,
    )
    assert measured.exact_match == sum(one.is_exact for one in answers) / 6
    assert measured.num_rows == 6
    assert measured.num_unstopped == sum(not one.stopped for one in answers)
    assert [sample.answer for sample in measured.samples] == [one.text for one in answers[:5]]
    first = measured.samples[0]
    assert (first.question, first.reference) == ("turn lamp 0 to 0 percent", '{"lamp":0}')
    assert measured.seconds > 0


def test_base_and_tuned_side_by_side(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TALKS, max_length=128)
    spec = EvaluateSpec(generate=GENERATE)  # type: ignore[arg-type]
    by_itself = evaluate_model(alone(base, "base"), part, spec, data)
    model = attach_adapter(base, LoraSpec(), seed=1).model
    fresh = evaluate_side_by_side(
        TransformersRuntime.on_base("tuned", model, base), part, spec, data
    )
    assert fresh.base is not None
    assert figures(fresh.base) == figures(by_itself)
    assert figures(fresh.tuned) == figures(by_itself)  # an untrained adapter says nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    both = evaluate_side_by_side(
        TransformersRuntime.on_base("tuned", model, base), part, spec, data
    )
    assert both.base is not None
    assert figures(both.base) == figures(by_itself)
    assert both.tuned.perplexity != both.base.perplexity
    assert [s.answer for s in both.tuned.samples] != [s.answer for s in both.base.samples]
    written = json.loads(json.dumps(both.as_dict(), allow_nan=False))
    assert written["tuned"]["name"] == "tuned"
    assert written["base"]["perplexity"]["loss"] == by_itself.perplexity.loss  # type: ignore[union-attr]
    assert written["base"]["samples"][0]["reference"] == '{"lamp":0}'


def test_without_baseline_and_without_figures(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TALKS)
    model = attach_adapter(base, LoraSpec(), seed=1).model
    spec = EvaluateSpec(perplexity=False, baseline=False)
    both = evaluate_side_by_side(
        TransformersRuntime.on_base("tuned", model, base), part, spec, data
    )
    assert both.base is None
    assert both.as_dict()["base"] is None
    assert both.tuned.perplexity is None
    assert both.tuned.exact_match is None
    assert both.tuned.num_rows == 0


def test_max_rows_limits_answers_but_not_perplexity(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TALKS, max_length=128)
    spec = EvaluateSpec(generate={**GENERATE, "max_rows": 2})  # type: ignore[arg-type]
    measured = evaluate_model(alone(base), part, spec, data)
    assert measured.num_rows == len(measured.samples) == 2
    assert measured.perplexity is not None
    assert measured.perplexity.num_tokens == part.num_supervised


def test_plain_texts_are_read_whole(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TEXTS, max_length=16)
    assert len(part.sequences) > len(TEXTS)
    spec = EvaluateSpec(window_tokens=16, stride_tokens=4)
    measured = evaluate_model(alone(base), part, spec, data).perplexity
    whole = [render(example, base.tokenizer, "assistant") for example in part.examples]
    expected = measure_perplexity(
        CausalScorer(base.model, 0), whole, batch_size=64, window_tokens=16, stride_tokens=4
    )
    assert measured == expected
    assert measured.num_tokens == sum(len(one.input_ids) - 1 for one in whole)
    pieces = measure_perplexity(
        CausalScorer(base.model, 0),
        part.sequences,
        batch_size=64,
        window_tokens=16,
        stride_tokens=4,
    )
    assert measured.loss != pieces.loss


def test_plain_texts_cannot_be_answered(base: Base, tmp_path: Path) -> None:
    part, data = held_out(base, tmp_path, TEXTS, max_length=64)
    said, spec = Said(), EvaluateSpec(generate=GENERATE)  # type: ignore[arg-type]
    measured = evaluate_model(alone(base), part, spec, data, said)
    assert measured.exact_match is None
    assert measured.num_rows == 0
    assert "no eval row has an answer" in said.warnings[0]


def test_dropped_rows_are_not_asked(base: Base, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "hello " * 90}, TALKS[0]["messages"][1]]}
    part, data = held_out(base, tmp_path, [long, *TALKS], max_length=128, max_dropped_share=0.5)
    assert len(part.sequences) == 6
    spec = EvaluateSpec(generate=GENERATE)  # type: ignore[arg-type]
    measured = evaluate_model(alone(base), part, spec, data)
    assert measured.num_rows == 6
    assert measured.samples[0].question == "turn lamp 0 to 0 percent"


def test_window_beyond_the_context_is_refused(base: Base) -> None:
    data = DataSpec(train=({"path": "a.jsonl"},), max_length=1024)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"data\.max_length is 1024, but .* 256 tokens"):
        window_size(context_tokens(base.model), EvaluateSpec(), data)
    with pytest.raises(ModelError, match=r"evaluate\.window_tokens is 300"):
        window_size(context_tokens(base.model), EvaluateSpec(window_tokens=300), data)
    assert window_size(context_tokens(base.model), EvaluateSpec(window_tokens=256), data) == 256
