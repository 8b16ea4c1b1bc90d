"""Batched greedy answers against one prompt at a time, written out without `generate`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from conftest import build_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qlora_kit.data.render import Prompt
from qlora_kit.errors import DataError
from qlora_kit.evaluate.generation import Answer, count_exact, exact_match, generate_answers
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import CausalModel
from qlora_kit.runtime.transformers import TransformersRuntime

from .tiny_models import CONTEXT, MODELS, gpt2, llama, rows

LENGTHS = [3, 17, 9, 1, 30, 9, 22]
LENGTH = 12
"""Tokens of an answer."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


class Ids:
    """Stands for a tokenizer; its text shows the very ids."""

    pad_token_id = 0

    def decode(self, ids: list[int], **options: bool) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return " " + " ".join(map(str, ids)) + "\n"


@pytest.fixture
def upstream_log() -> Iterator[list[logging.LogRecord]]:
    """Everything that transformers says at warning level or above."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler, level = Keep(logging.WARNING), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(handler)
    yield records
    transformers.logging.remove_handler(handler)
    transformers.logging.set_verbosity(level)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    return [Prompt(row.input_ids, "right", row.origin) for row in rows(list(lengths))]


def answer(
    model: CausalModel,
    asked: Sequence[Prompt],
    *,
    max_new_tokens: int = LENGTH,
    batch_size: int = 3,
    stop_ids: frozenset[int] = frozenset(),
    **options: Progress,
) -> list[Answer]:
    return generate_answers(
        TransformersRuntime("it", model, Ids(), stop_ids),  # type: ignore[arg-type]
        asked,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        **options,
    )


def greedy(model: PreTrainedModel, prompt: Prompt, num_tokens: int) -> list[int]:
    """The definition: append the likeliest token, with no cache, no padding and no batch."""
    ids = list(prompt.input_ids)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt.input_ids) :]


def text_of(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_equals_greedy_one_by_one(name: str, batch_size: int) -> None:
    model, asked = MODELS[name](), prompts()
    expected = [text_of(greedy(model, prompt, LENGTH)) for prompt in asked]
    answers = answer(model, asked, batch_size=batch_size)
    assert [one.text for one in answers] == expected
    assert [one.origin for one in answers] == [prompt.origin for prompt in asked]
    assert len(set(expected)) == len(asked)
    assert all(one.num_new_tokens == LENGTH and not one.stopped for one in answers)


@pytest.mark.parametrize("name", MODELS)
def test_equals_upstream_one_by_one(name: str) -> None:
    model, asked = MODELS[name](), prompts()
    config = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, pad_token_id=0)
    for one, prompt in zip(answer(model, asked), asked, strict=True):
        ids = torch.tensor([prompt.input_ids])
        output = model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
        assert one.text == text_of(output[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_each_row_ends_at_its_own_stop(name: str) -> None:
    model, asked = MODELS[name](), prompts()
    free = [greedy(model, prompt, LENGTH) for prompt in asked]
    stops = frozenset({free[0][-1], free[4][1]})
    num_stopped = 0
    for one, ids in zip(answer(model, asked, stop_ids=stops), free, strict=True):
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        num_stopped += end is not None
        assert one.stopped == (end is not None)
        assert one.num_new_tokens == (LENGTH if end is None else end + 1)
        assert one.text == text_of(ids[:end])
    assert 2 <= num_stopped < len(asked)


def test_ends_when_all_rows_have_ended() -> None:
    model, asked = llama(), prompts()
    calls: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    free = [greedy(model, prompt, 1)[0] for prompt in asked]
    calls.clear()
    answers = answer(model, asked, stop_ids=frozenset(free), batch_size=50, max_new_tokens=60)
    assert len(calls) <= 2
    assert all(one.stopped and one.num_new_tokens == 1 and one.text == "" for one in answers)


def test_the_models_own_settings_change_nothing(
    upstream_log: list[logging.LogRecord], recwarn: pytest.WarningsRecorder
) -> None:
    model, asked = llama(), prompts()
    expected = answer(model, asked)
    seen = [int(token) for token in expected[0].text.split()]
    own = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_p=0.5,
        top_k=3,
        repetition_penalty=3.0,
        max_length=12,
        min_new_tokens=15,
        suppress_tokens=seen[:5],
        forced_eos_token_id=7,
        use_cache=False,
    )
    model.generation_config = own
    upstream_log.clear()
    assert answer(model, asked) == expected
    assert model.generation_config is own
    assert [record.getMessage() for record in upstream_log] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_adapter_answers_and_can_be_turned_off(upstream_log: list[logging.LogRecord]) -> None:
    model, asked = llama(), prompts()
    plain = answer(model, asked)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    upstream_log.clear()
    tuned = answer(adapted, asked)
    assert all(one.text != other.text for one, other in zip(tuned, plain, strict=True))
    with adapted.disable_adapter():
        assert answer(adapted, asked) == plain
    assert upstream_log == []
    merged = adapted.merge_and_unload()
    assert [one.text for one in tuned] == [text_of(greedy(merged, p, LENGTH)) for p in asked]


def test_uses_the_cache_after_training_without() -> None:
    """A model as training leaves it: train mode, checkpointing on, cache off in its config."""
    model, asked = llama(), prompts([5, 5])
    expected = answer(model, asked)
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda _, given, __: widths.append(given[0].shape[1])
    )
    assert answer(model, asked) == expected
    assert widths == [5] + [1] * (LENGTH - 1)
    assert all(module.training for module in model.modules())


def test_context_ends_an_answer() -> None:
    model = gpt2()
    asked = prompts([CONTEXT - 4, 6, CONTEXT - 1, CONTEXT - 8, 7])
    answers = answer(model, asked, batch_size=5)
    assert [one.num_new_tokens for one in answers] == [4, LENGTH, 1, 8, LENGTH]
    for one, prompt in zip(answers, asked, strict=True):
        assert one.text == text_of(greedy(model, prompt, one.num_new_tokens))
        assert not one.stopped
        assert not one.too_long


@pytest.mark.parametrize("excess", [0, 5])
def test_prompt_without_room_is_counted(excess: int) -> None:
    asked = prompts([6, CONTEXT + excess, 7])
    answers = answer(gpt2(), asked)
    assert [one.too_long for one in answers] == [False, True, False]
    assert answers[1] == Answer(asked[1].origin, "", "right", 0, stopped=False, too_long=True)


def test_model_without_a_limit_has_room() -> None:
    """Bloom has no table of positions: its attention counts distances."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(config).eval()
    asked = prompts([CONTEXT + 5, 7])
    answers = answer(model, asked, max_new_tokens=5)
    assert [one.text for one in answers] == [text_of(greedy(model, p, 5)) for p in asked]


def test_empty_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the prompt is empty"):
        answer(llama(), [Prompt((), "right", "rows.jsonl:1")])


def test_no_prompts_no_answers() -> None:
    assert answer(llama(), []) == []


def test_progress_counts_prompts() -> None:
    class Count(Progress):
        total = 0

        def update(self, advance: int = 1, **fields: str) -> None:
            self.total += advance

    count = Count()
    answer(gpt2(), prompts([6, CONTEXT, 7]), progress=count)
    assert count.total == 3


def test_text_is_as_the_tokens_say(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Special tokens go, spaces before punctuation stay."""
    said = ' {"action" : "set" } , please . '
    ids = tokenizer("<|im_start|>" + said + "<|im_end|> and on", add_special_tokens=False)[
        "input_ids"
    ]
    model = llama()
    monkeypatch.setattr(
        type(model), "generate", lambda self, input_ids, **_: torch.tensor([[*input_ids[0], *ids]])
    )
    [one] = generate_answers(
        TransformersRuntime("it", model, tokenizer, frozenset({tokenizer.eos_token_id})),
        [Prompt((5, 6), said.strip(), "row")],
        max_new_tokens=50,
        batch_size=1,
    )
    assert one.text == said.strip()
    assert one.is_exact
    assert one.num_new_tokens == ids.index(tokenizer.eos_token_id) + 1


def test_exact_match() -> None:
    answers = [
        Answer("1", "yes", " yes\n", 2, stopped=True),
        Answer("2", "Yes", "yes", 2, stopped=True),
        Answer("3", "yes it is", "yes", 4, stopped=True),
        Answer("4", "yes", "yes", 2, stopped=False),
        Answer("5", "", "", 0, stopped=False, too_long=True),
    ]
    assert count_exact(answers) == 2
    assert exact_match(answers) == pytest.approx(0.4)
    with pytest.raises(DataError, match="no prompt with a reference"):
        exact_match([])
