"""What is supervised, for the chat formats that people use."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message, PlainText, PromptCompletion
from qlora_kit.data.mark import NOTE_LEFT_OUT, NOTE_REWRITTEN, NOTE_UNASKED
from qlora_kit.data.render import NOTE_MERGED, render, render_prompt
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.data.spelled import NOTE_KEPT_AS_TEXT, NOTE_MADE_TOKEN, NOTE_SPELLED
from qlora_kit.errors import DataError

from .formats import (
    CHATML,
    COUNTING,
    FORGETTING,
    FORMATS,
    MISTRAL,
    NO_END,
    NO_SYSTEM,
    PHI3,
    QWEN3,
    R1,
    TRAILING_SPACE,
    build,
    build_sentencepiece,
    tokenizer_of,
)

ORIGIN = "rows.jsonl:1"


def talk(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant by turns, the user first."""
    messages = [Message("system", system)] if system is not None else []
    for number, content in enumerate(contents):
        messages.append(Message("assistant" if number % 2 else "user", content))
    return Conversation(tuple(messages), ORIGIN)


def dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [message.as_dict() for message in conversation.messages]


def supervised(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    for token, label in zip(sequence.input_ids, sequence.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
    runs = groupby(sequence.labels, key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(run)) for is_labelled, run in runs if is_labelled]


def whole(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(list(sequence.input_ids))


@pytest.mark.parametrize("name", FORMATS)
def test_one_answer(name: str) -> None:
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    conversation = talk("hello", "fine, thanks 12")
    sequence = render(conversation, tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == [form.written("fine, thanks 12") + form.end]
    assert sequence.notes == ()
    text = tokenizer.apply_chat_template(dicts(conversation), tokenize=False)
    assert whole(sequence, tokenizer) == text


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("qwen3", "trailing space")])
def test_several_answers(name: str) -> None:
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    sequence = render(talk("hello", "fine", "you?", "thanks", "12", "no"), tokenizer, "assistant")
    expected = [form.written(content) + form.end for content in ("fine", "thanks", "no")]
    assert supervised(sequence, tokenizer) == expected
    assert sequence.notes == ()


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].takes_system])
def test_a_system_prompt_is_context(name: str) -> None:
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    sequence = render(talk("hello", "fine", system="be brief"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == [form.written("fine") + form.end]
    assert whole(sequence, tokenizer).count("be brief") == 1


def test_an_injected_system_prompt_is_context() -> None:
    tokenizer = tokenizer_of("smollm2")
    sequence = render(talk("hello", "fine"), tokenizer, "assistant")
    assert "named SmolLM" in whole(sequence, tokenizer)
    assert supervised(sequence, tokenizer) == ["fine<|im_end|>"]


def test_bos_stands_once_where_the_template_writes_it() -> None:
    tokenizer = tokenizer_of("llama3")
    ids = render(talk("hello", "fine"), tokenizer, "assistant").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "reason"), [("gemma", "System role not supported"), ("mistral", "Only user and")]
)
def test_a_refusal_of_the_template_is_passed_on(name: str, reason: str) -> None:
    with pytest.raises(RowRefused, match=f"{ORIGIN}: the chat template refuses it: {reason}"):
        render(talk("hello", "fine", system="be brief"), tokenizer_of(name), "assistant")


def test_reasoning_is_supervised_in_the_last_answer_alone() -> None:
    """Qwen3's template strips it from earlier ones: the model never writes them like that."""
    tokenizer = tokenizer_of("qwen3")
    sequence = render(
        talk("hello", "<think>a</think>one", "12", "<think>b</think>two"), tokenizer, "assistant"
    )
    assert supervised(sequence, tokenizer) == ["<think>\nb\n</think>\n\ntwo<|im_end|>"]
    assert "assistant\none<|im_end|>" in whole(sequence, tokenizer)
    assert sequence.notes == (NOTE_LEFT_OUT, NOTE_REWRITTEN)


def test_an_empty_reasoning_block_counts_as_the_answer() -> None:
    """The prompt does not hold it, so the model has to write it; earlier answers have none."""
    tokenizer = tokenizer_of("qwen3")
    sequence = render(talk("hello", "one", "12", "two"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["<think>\n\n</think>\n\ntwo<|im_end|>"]
    assert sequence.notes == (NOTE_REWRITTEN,)


def test_an_answer_that_is_always_rewritten_is_refused() -> None:
    conversation = talk("hello", "one", "12")
    with pytest.raises(RowRefused, match="rewrites every answer once more messages follow"):
        render(conversation, tokenizer_of("qwen3"), "assistant")


def test_a_template_that_rewrites_what_came_before_is_refused() -> None:
    tokenizer = build(template=COUNTING)
    with pytest.raises(RowRefused, match="is not how an answered turn begins"):
        render(talk("hello", "one", "12", "two"), tokenizer, "assistant")


def test_a_template_that_forgets_what_came_before_is_refused() -> None:
    tokenizer = build(template=FORGETTING)
    sequence = render(talk("hello", "one"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["one<|im_end|>"]
    assert sequence.notes == ()
    with pytest.raises(RowRefused, match="is not how an answered turn begins"):
        render(talk("hello", "one", "12", "two"), tokenizer, "assistant")


def test_a_prompt_that_opens_what_no_answer_has_is_refused() -> None:
    tokenizer = build(template=R1)
    with pytest.raises(RowRefused, match="is not how an answered turn begins"):
        render(talk("hello", "one"), tokenizer, "assistant")
    sequence = render(talk("hello", "one"), tokenizer, "all")
    assert sequence.labels[1:] == sequence.input_ids[1:]


def test_a_template_that_drops_part_of_an_answer_is_refused() -> None:
    tokenizer = build(template=R1.replace("assistant\n<think>\n", "assistant\n"))
    assert supervised(render(talk("hello", "one"), tokenizer, "assistant"), tokenizer)
    with pytest.raises(RowRefused, match="leaves out part of an answer"):
        render(talk("hello", "<think>a</think>one"), tokenizer, "assistant")


def test_a_template_without_end_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"closes an answer with '\\n', which is no special token"):
        render(talk("hello", "fine"), build(template=NO_END), "assistant")


def test_a_message_that_the_template_drops_is_noted() -> None:
    tokenizer = build(template=NO_SYSTEM)
    sequence = render(talk("hello", "fine", system="be brief"), tokenizer, "assistant")
    assert sequence.notes == (NOTE_LEFT_OUT,)
    assert render(talk("hello", "fine"), tokenizer, "assistant").notes == ()


def test_generation_tags_change_nothing() -> None:
    tags = "{% generation %}", "{% endgeneration %}"
    tagged = CHATML.replace("{{ m.content }}", tags[0] + "{{ m.content }}" + tags[1])
    sequence = render(talk("hello", "fine"), build(template=tagged), "assistant")
    assert supervised(sequence, build()) == ["fine<|im_end|>"]


def test_special_tokens_inside_an_answer() -> None:
    """Some formats write a channel before the text; the model has to write it, too."""
    body = "{{ m.content }}"
    channel = "{% if m.role == 'assistant' %}<|endoftext|>final<|endoftext|>{% endif %}"
    tokenizer = build(template=CHATML.replace(body, channel + body))
    conversation = talk("hello", "one", "12", "two")
    said = [f"<|endoftext|>final<|endoftext|>{content}<|im_end|>" for content in ("one", "two")]
    assert supervised(render(conversation, tokenizer, "assistant"), tokenizer) == said
    prompt = render_prompt(conversation, tokenizer)
    assert prompt is not None
    assert prompt.reference == "finaltwo"


def test_an_end_token_that_is_not_declared_special() -> None:
    tokenizer = build(eos="<|endoftext|>", template=CHATML.replace("<|im_end|>", "</turn>"))
    tokenizer.add_tokens(["</turn>", "\n", "\n\n", "<think>"])
    sequence = render(talk("hello", "<think>fine"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["<think>fine</turn>"]
    sequence = render(talk("hello", "a </turn> b"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["a </turn> b</turn>"]
    assert sequence.labels.count(tokenizer.convert_tokens_to_ids("</turn>")) == 1


def test_no_template() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template") as caught:
        render(talk("hello", "fine"), build(template=None), "assistant")
    assert not isinstance(caught.value, RowRefused)


def test_a_template_with_a_mistake_in_it() -> None:
    broken = CHATML.replace("m.content", "m.content + 1")
    with pytest.raises(DataError, match=r"the chat template refuses it: can only concatenate"):
        render(talk("hello", "fine"), build(template=broken), "assistant")


def test_an_end_token_that_swallows_the_space_after_it() -> None:
    """Phi-3's special tokens reach up to the next word; the end must be supervised even so."""
    tokens = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = build(tokens, None, "<|endoftext|>", PHI3, swallows_space=True)
    sequence = render(talk("hello", "fine", "you?", "thanks"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["fine<|end|>", "thanks<|end|>"]


def test_two_answers_in_a_row() -> None:
    messages = [*talk("hello", "fine").messages, Message("assistant", "thanks")]
    tokenizer = tokenizer_of("chatml")
    sequence = render(Conversation(tuple(messages), ORIGIN), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["fine<|im_end|>", "thanks<|im_end|>"]


def test_what_nothing_asks_for_is_context() -> None:
    messages = (Message("assistant", "welcome"), *talk("hello", "fine").messages)
    tokenizer = tokenizer_of("chatml")
    sequence = render(Conversation(messages, ORIGIN), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["fine<|im_end|>"]
    assert sequence.notes == (NOTE_UNASKED,)


def test_given_answers_are_context() -> None:
    tokenizer = tokenizer_of("chatml")
    messages = talk("hello", "one", "12", "two").messages
    sequence = render(Conversation(messages, ORIGIN, num_given=3), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["two<|im_end|>"]
    assert sequence.notes == ()


def test_without_an_answer_nothing_is_supervised() -> None:
    sequence = render(talk("hello"), tokenizer_of("chatml"), "assistant")
    assert sequence.num_supervised == 0
    assert sequence.input_ids


@pytest.mark.parametrize("name", FORMATS)
def test_loss_on_all(name: str) -> None:
    """The first token is predicted from nothing, so it is never supervised."""
    sequence = render(talk("hello", "fine"), tokenizer_of(name), "all")
    assert sequence.labels == (IGNORE_INDEX, *sequence.input_ids[1:])
    assert sequence.num_supervised == len(sequence.input_ids) - 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_special_token_spelled_in_a_message_stays_text(name: str) -> None:
    """As that token it would be a turn that ends in the middle, or one that nobody wrote."""
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    plain = render(talk("a b", "fine"), tokenizer, "all").input_ids
    for token in (form.end, form.tokens[0]):
        token_id = tokenizer.convert_tokens_to_ids(token)
        for asked, said in ((f"a {token} b", "fine"), ("hello", f"{token}\nfine")):
            sequence = render(talk(asked, said), tokenizer, "assistant")
            assert sequence.input_ids.count(token_id) == plain.count(token_id)
            assert supervised(sequence, tokenizer) == [form.written(said) + form.end]
            assert token in whole(sequence, tokenizer).replace(form.end, "", 0)
            assert sequence.notes == (NOTE_SPELLED,)
            prompt = render_prompt(talk(asked, said), tokenizer)
            assert prompt is not None
            assert sequence.input_ids[: len(prompt.input_ids)] == prompt.input_ids


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("hello </s> you", "fine"),
        ("</s>hello", "fine"),
        ("hello</s>", "fine"),
        ("hello", "fine </s> you"),
        ("hello", "</s>fine"),
        ("hello", "fine</s>"),
        ("a <s> b</s></s>", "</s>"),
    ],
)
@pytest.mark.parametrize("template", [MISTRAL, MISTRAL.replace("' ' + m.content", "m.content")])
def test_a_spelled_token_where_the_tokenizer_writes_a_space_before_words(
    template: str, asked: str, said: str
) -> None:
    """As SentencePiece does at the start of a text: a piece of one must not gain any."""
    tokenizer = build_sentencepiece(template)
    conversation = talk(asked, said)
    sequence = render(conversation, tokenizer, "assistant")
    text = tokenizer.apply_chat_template(dicts(conversation), tokenize=False)
    assert whole(sequence, tokenizer) == text
    assert [sequence.input_ids.count(n) for n in (1, 2)] == [1, 1]
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<s>", "</s>"]
    assert [one.strip() for one in supervised(sequence, tokenizer)] == [said + "</s>"]
    prompt = render_prompt(conversation, tokenizer)
    assert prompt is not None
    assert prompt.reference == said
    assert sequence.input_ids[: len(prompt.input_ids)] == prompt.input_ids


PIECES = [
    "\n",
    "\n\n",
    " ",
    "  ",
    "12",
    "7",
    "fine",
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "👩‍🚀",
    "\u2028",
]
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
)
SPELLED = st.sampled_from(["<|im_end|>", "</s>", "<eos>", "<|eot_id|>", "<|im_", "[INST]"])
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("name", FORMATS)
@QUICK
@given(contents=st.lists(TEXTS | SPELLED, min_size=1, max_size=3), answer=TEXTS | SPELLED)
@example(contents=["hello"], answer="\n\nfine")
@example(contents=["hello"], answer="  fine  \n")
@example(contents=["hello"], answer="")
@example(contents=["a", "\n\n\nb", "c"], answer="🙂é\n")
def test_supervised_tokens_say_what_the_assistant_says(
    name: str, contents: list[str], answer: str
) -> None:
    """For any text: the answers and their end tokens, whole; a prompt that generation shares."""
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    if len(contents) % 2 == 0:
        contents = contents[1:]
    conversation = talk(*contents, answer)
    sequence = render(conversation, tokenizer, "assistant")
    found = supervised(sequence, tokenizer)
    assert found[-1] == form.written(answer) + form.end
    if len(contents) == 3 and not {NOTE_MERGED, NOTE_REWRITTEN} & set(sequence.notes):
        assert found == [form.written(contents[1]) + form.end, found[-1]]
    else:
        assert len(found) == 1
    prompt = render_prompt(conversation, tokenizer)
    assert prompt is not None
    length = len(prompt.input_ids)
    assert prompt.input_ids == sequence.input_ids[:length]
    assert sequence.labels[length - 1] == IGNORE_INDEX
    assert sequence.labels[length] != IGNORE_INDEX
    text = tokenizer.apply_chat_template(dicts(conversation), tokenize=False)
    assert whole(sequence, tokenizer) == text


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("answer", ["fine", "\n\nfine", " fine ", "12", "🙂", ""])
def test_the_prompt_is_what_training_saw(name: str, answer: str) -> None:
    form, tokenizer = FORMATS[name], tokenizer_of(name)
    conversation = talk("hello", "one", "12", answer)
    prompt = render_prompt(conversation, tokenizer)
    assert prompt is not None
    asked = dicts(conversation)[:-1]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert list(prompt.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    sequence = render(conversation, tokenizer, "assistant")
    assert sequence.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert prompt.reference == form.written(answer).strip()


def test_an_answer_that_merges_with_its_prompt_is_cut_from_it() -> None:
    """As one text "assistant:" and " fine" would share the space, which generation never does."""
    tokenizer = build(template=TRAILING_SPACE)
    together = "### user: hello\n### assistant: fine<|im_end|>\n"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(together)["input_ids"])
    sequence = render(talk("hello", "fine"), tokenizer, "assistant")
    rendered = tokenizer.convert_ids_to_tokens(list(sequence.input_ids))
    assert "Ġfine" in tokens
    assert "Ġfine" not in rendered
    assert supervised(sequence, tokenizer) == ["fine<|im_end|>"]
    assert whole(sequence, tokenizer) == together


@pytest.mark.parametrize(("name", "answer"), [("chatml", "\n\n\none"), ("trailing space", "fine")])
def test_an_earlier_answer_that_merges_is_context_and_noted(name: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    sequence = render(talk("hello", answer, "12", "two"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["two<|im_end|>"]
    assert sequence.notes == (NOTE_MERGED,)


def test_a_tokenizer_that_puts_a_space_before_words() -> None:
    tokenizer = build_sentencepiece()
    sequence = render(talk("hello", "fine", "you", "thanks"), tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["fine</s>", "thanks</s>"]
    assert tokenizer.convert_ids_to_tokens(sequence.input_ids[:2])[0] == "<s>"
    assert "▁▁" not in "".join(tokenizer.convert_ids_to_tokens(list(sequence.input_ids)))


def test_prompts_of_what_has_no_answer() -> None:
    tokenizer = tokenizer_of("chatml")
    assert render_prompt(PlainText("hello", ORIGIN), tokenizer) is None
    assert render_prompt(talk("hello"), tokenizer) is None
    assert render_prompt(PromptCompletion("", "fine", ORIGIN), tokenizer) is None
    answer = (Message("assistant", "fine"),)
    assert render_prompt(Conversation(answer, ORIGIN), tokenizer) is None


def test_the_prompt_of_a_template_that_cannot_be_told_apart() -> None:
    prompt = render_prompt(talk("hello", "one"), build(template=R1))
    assert prompt is not None
    assert prompt.reference == "one"


def test_the_reference_holds_the_reasoning_that_is_trained() -> None:
    prompt = render_prompt(talk("hello", "one"), build(template=QWEN3))
    assert prompt is not None
    assert prompt.reference == "<think>\n\n</think>\n\none"


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Q: hello\nA:", " fine"),
        ("Q: hello\nA: ", "fine"),
        ("Q: hello\n", "\n\nfine"),
        ("hel", "lo"),
        ("naïve 日", "本 🙂"),
        ("hello", ""),
        ("", "fine"),
        ("<|begin_of_text|>hello", " fine"),
        ("hello", " fine<|end_of_text|>"),
    ],
)
def test_prompt_and_completion(prompt: str, completion: str, adds_bos: bool) -> None:
    """Joined as they stand, BOS once where the tokenizer wants it, EOS once."""
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = build((bos, eos), bos, eos, None, adds_bos=adds_bos)
    row = PromptCompletion(prompt, completion, ORIGIN, split_special_tokens=False)
    sequence = render(row, tokenizer, "assistant")
    text = whole(sequence, tokenizer)
    wanted = prompt + completion.removesuffix(eos) + eos
    assert text == (bos + wanted if adds_bos and not prompt.startswith(bos) else wanted)
    if prompt or adds_bos:
        assert supervised(sequence, tokenizer) == [completion.removesuffix(eos) + eos]
    asked = render_prompt(row, tokenizer)
    if asked is not None:
        assert sequence.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert asked.reference == completion.removesuffix(eos).strip()
    everything = render(row, tokenizer, "all")
    assert everything.input_ids == sequence.input_ids
    assert everything.labels[1:] == everything.input_ids[1:]


def test_a_prompt_that_ends_with_eos_gets_another_for_an_empty_completion() -> None:
    tokenizer = tokenizer_of("chatml")
    row = PromptCompletion("hello<|im_end|>", "", ORIGIN, split_special_tokens=False)
    sequence = render(row, tokenizer, "assistant")
    assert supervised(sequence, tokenizer) == ["<|im_end|>"]


def test_a_completion_that_cannot_be_cut_from_its_prompt_is_refused() -> None:
    """This tokenizer would put a space before the completion if it were encoded by itself."""
    tokenizer = build_sentencepiece(None)
    joined = render(PromptCompletion("hello", " fine", ORIGIN), tokenizer, "assistant")
    assert whole(joined, tokenizer) == "<s> hello fine</s>"
    assert supervised(joined, tokenizer) == ["fine</s>"]
    with pytest.raises(RowRefused, match="first token of an answer begins before it"):
        render(PromptCompletion("he", "llo", ORIGIN), tokenizer, "assistant")


PLAIN = {
    "chatml": tokenizer_of("chatml"),
    "no template": build(template=None),
    "a template that ends no turn": build(template=NO_END),
    "an end that is not special": build(("</s>",), None, "</s>", CHATML),
    "sentencepiece": build_sentencepiece(None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_special_token_spelled_in_plain_text_stays_text(name: str) -> None:
    """Its id is nowhere but where BOS and EOS belong; its letters are there, and nothing else."""
    tokenizer = PLAIN[name]
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    for text in (f"hello {eos} you", f"{eos}hello", f"hello{eos}", f"a{eos}{eos} b {eos}"):
        sequence = render(PlainText(text, ORIGIN), tokenizer, "assistant")
        assert sequence.input_ids.count(eos_id) == 1
        assert sequence.input_ids[-1] == eos_id
        assert whole(sequence, tokenizer).removeprefix("<s>").strip() == text + eos
        assert sequence.notes == (NOTE_KEPT_AS_TEXT,)
        made = render(PlainText(text, ORIGIN, False), tokenizer, "assistant")
        assert made.input_ids.count(eos_id) == text.count(eos) + (not text.endswith(eos))
        assert made.notes == (NOTE_MADE_TOKEN,)
    plain = render(PlainText("hello you", ORIGIN), tokenizer, "assistant")
    assert plain == render(PlainText("hello you", ORIGIN, False), tokenizer, "assistant")
    assert plain.notes == ()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_a_special_token_spelled_in_a_prompt_or_completion_stays_text(
    name: str, loss_on: str
) -> None:
    tokenizer = PLAIN[name]
    eos, eos_id = tokenizer.eos_token, tokenizer.eos_token_id
    rows = (f"hello {eos}", " fine"), ("hello", f" fine {eos} you"), (f"a {eos} b", f" fine{eos}")
    for prompt, completion in rows:
        row = PromptCompletion(prompt, completion, ORIGIN)
        sequence = render(row, tokenizer, loss_on)
        assert [sequence.input_ids.count(eos_id), sequence.labels.count(eos_id)] == [1, 1]
        text = whole(sequence, tokenizer).removeprefix("<s>").strip()
        assert text == prompt + completion + eos
        assert sequence.notes == (NOTE_KEPT_AS_TEXT,)
        asked = render_prompt(row, tokenizer)
        assert asked is not None
        assert asked.reference == completion.strip()
        assert sequence.input_ids[: len(asked.input_ids)] == asked.input_ids
        if loss_on == "assistant":
            [said] = supervised(sequence, tokenizer)
            assert said.strip() == completion.strip() + eos
        made = render(replace(row, split_special_tokens=False), tokenizer, loss_on)
        num_spelled = (prompt + completion).count(eos)
        assert made.input_ids.count(eos_id) == num_spelled + (not completion.endswith(eos))
        assert made.notes == (NOTE_MADE_TOKEN,)


def test_a_prompt_that_is_cut_from_its_completion_keeps_what_it_spells() -> None:
    """In the middle of a word, so that the two must be encoded by themselves."""
    tokenizer = tokenizer_of("chatml")
    row = PromptCompletion("a <|im_end|> hel", "lo <|im_end|>", ORIGIN)
    sequence = render(row, tokenizer, "assistant")
    assert sequence.input_ids.count(tokenizer.eos_token_id) == 1
    assert whole(sequence, tokenizer) == "a <|im_end|> hello <|im_end|><|im_end|>"
    assert supervised(sequence, tokenizer) == ["lo <|im_end|><|im_end|>"]


@pytest.mark.parametrize("adds_eos", [True, False])
def test_plain_text(adds_eos: bool) -> None:
    tokenizer = build_sentencepiece(None, adds_eos=adds_eos)
    for loss_on in ("assistant", "all"):
        sequence = render(PlainText("hello how are you", ORIGIN), tokenizer, loss_on)
        assert whole(sequence, tokenizer) == "<s> hello how are you</s>"
        assert sequence.labels == (IGNORE_INDEX, *sequence.input_ids[1:])


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_blank_text_has_nothing_supervised(text: str) -> None:
    assert render(PlainText(text, ORIGIN), tokenizer_of("llama3"), "assistant").num_supervised == 0


@pytest.mark.parametrize("row", [PlainText("hello", ORIGIN), PromptCompletion("a", "b", ORIGIN)])
def test_a_tokenizer_without_end(row: PlainText | PromptCompletion) -> None:
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        render(row, build(eos=None), "assistant")
