"""Whose words are learned, and that what only looks like a token is text."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message, PlainText, PromptCompletion, ToolCall
from qlora_kit.data.mark import (
    NOTE_LEFT_OUT,
    NOTE_REWRITTEN,
    NOTE_UNASKED,
    LossOn,
    mark,
    supervised_turns,
)
from qlora_kit.data.render import render
from qlora_kit.data.rows import Row, RowRefused
from qlora_kit.data.schemas import Recogniser
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.data.spelled import NOTE_SPELLED
from qlora_kit.errors import DataError
from qlora_kit.recipe import SourceSpec
from qlora_kit.templates import library

from .formats import CHATML, COUNTING, FORGETTING, R1, build, tokenizer_of

ORIGIN = "rows.jsonl:1"
# Qwen3's: reasoning is a field of its own, and is written in answers behind the last question.
REASONING = """\
{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def talk(*turns: tuple[str, str] | Message, **fields: Any) -> Conversation:
    messages = tuple(one if isinstance(one, Message) else Message(*one) for one in turns)
    return Conversation(messages, ORIGIN, **fields)


FOUR = talk(
    ("system", "be brief"),
    ("user", "hello"),
    ("assistant", "fine"),
    ("user", "12"),
    ("assistant", "no"),
)
LONG = talk(
    ("system", "how are you " * 9), *FOUR.messages[1:-1], ("assistant", "fine, thanks " * 9)
)
LAMP = {
    "type": "function",
    "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}},
}
CALLING = talk(
    ("user", "turn the lamp to 30"),
    Message("assistant", "", (ToolCall("lamp", {"to": 30, "now": True}),)),
    Message("tool", '{"ok": 1}', name="lamp"),
    ("assistant", "fine"),
    tools=(LAMP,),
)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return tokenizer_of("chatml")


@pytest.fixture(scope="module")
def tools() -> PreTrainedTokenizerBase:
    return build(template=library()["chatml-tools"].read_text())


def learned(
    conversation: Any, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn = "assistant"
) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    return runs_of(render(conversation, tokenizer, loss_on), tokenizer)


def runs_of(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    runs = groupby(sequence.labels, key=lambda label: label != IGNORE_INDEX)
    return [tokenizer.decode(list(run)) for is_labelled, run in runs if is_labelled]


def test_who_is_learned_from(chatml: PreTrainedTokenizerBase) -> None:
    end = "<|im_end|>"
    assert learned(FOUR, chatml) == [f"fine{end}", f"no{end}"]
    assert learned(FOUR, chatml, "last") == [f"no{end}"]
    assert learned(FOUR, chatml, ("user",)) == [f"hello{end}", f"12{end}"]
    assert learned(FOUR, chatml, ("system", "assistant")) == [
        f"be brief{end}",
        f"fine{end}",
        f"no{end}",
    ]
    everything = render(FOUR, chatml, "all")
    assert everything.labels == (IGNORE_INDEX, *everything.input_ids[1:])


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all", ("user", "assistant")])
def test_a_message_that_is_not_to_be_learned(
    chatml: PreTrainedTokenizerBase, loss_on: LossOn
) -> None:
    turns = [*FOUR.messages[:-1], Message("assistant", "no", train=False)]
    expected = {
        "assistant": ["fine<|im_end|>"],
        "last": [],
        "all": ["be brief<|im_end|>", "hello<|im_end|>", "fine<|im_end|>", "12<|im_end|>"],
        ("user", "assistant"): ["hello<|im_end|>", "fine<|im_end|>", "12<|im_end|>"],
    }
    assert learned(talk(*turns), chatml, loss_on) == expected[loss_on]


def test_a_message_that_is_to_be_learned_whatever_its_role(
    chatml: PreTrainedTokenizerBase,
) -> None:
    turns = [
        FOUR.messages[0],
        Message("user", "hello", train=True),
        Message("assistant", "fine", train=False),
        *FOUR.messages[3:],
    ]
    assert learned(talk(*turns), chatml) == ["hello<|im_end|>", "no<|im_end|>"]
    asked = [*FOUR.messages[:2], Message("assistant", "fine", train=True), *FOUR.messages[3:]]
    assert learned(talk(*asked), chatml, ("user",)) == [
        "hello<|im_end|>",
        "fine<|im_end|>",
        "12<|im_end|>",
    ]


def test_a_field_of_the_row_says_what_is_learned(chatml: PreTrainedTokenizerBase) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "fine", "train": False},
        {"role": "user", "content": "12"},
        {"role": "assistant", "content": "no", "train": True},
    ]
    recogniser = Recogniser(SourceSpec(path="rows.jsonl"))
    example = recogniser.recognise(Row("rows.jsonl", 1, {"messages": turns}))
    assert learned(example, chatml) == ["no<|im_end|>"]


@pytest.mark.parametrize("loss_on", ["assistant", "last", ("assistant", "user")])
def test_what_is_given_is_never_learned(chatml: PreTrainedTokenizerBase, loss_on: LossOn) -> None:
    given = Conversation(FOUR.messages, ORIGIN, num_given=4)
    assert supervised_turns(given, loss_on) == (False, False, False, False, True)
    assert learned(given, chatml, loss_on) == ["no<|im_end|>"]


def test_what_is_said_unasked_is_context(chatml: PreTrainedTokenizerBase) -> None:
    sequence = render(
        talk(("assistant", "hello"), ("user", "12"), ("assistant", "no")), chatml, "assistant"
    )
    assert runs_of(sequence, chatml) == ["no<|im_end|>"]
    assert sequence.notes == (NOTE_UNASKED,)


def test_calls_and_their_results(tools: PreTrainedTokenizerBase) -> None:
    call = '<tool_call>\n{"name": "lamp", "arguments": {"to": 30, "now": true}}\n</tool_call>'
    assert learned(CALLING, tools) == [f"{call}<|im_end|>", "fine<|im_end|>"]
    assert learned(CALLING, tools, "last") == ["fine<|im_end|>"]
    [result] = learned(CALLING, tools, ("tool",))
    assert result.startswith('{"ok": 1}')
    assert result.endswith("<|im_end|>") or result == '{"ok": 1}'
    sequence = render(CALLING, tools, "assistant")
    text = tools.decode(sequence.input_ids)
    assert '"name": "lamp"' in text.partition("<|im_start|>user")[0]
    assert sequence.notes == ()


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (CALLING, "does not show the tools"),
        (talk(*CALLING.messages), "leaves out tool calls"),
        (talk(("user", "hello"), ("assistant", "fine"), tools=(LAMP,)), "does not show the tools"),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(
    chatml: PreTrainedTokenizerBase, example: Conversation, reason: str
) -> None:
    with pytest.raises(RowRefused, match=reason):
        render(example, chatml, "assistant")


ARGUMENTS = st.dictionaries(
    st.text(alphabet="abé", min_size=1, max_size=3),
    st.one_of(
        st.integers(-9, 9), st.booleans(), st.none(), st.text(alphabet="a\"\\\n é'", max_size=4)
    ),
    max_size=3,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(arguments=ARGUMENTS)
def test_arguments_as_an_object_and_as_json_are_the_same(arguments: dict[str, Any]) -> None:
    tokenizer = build_tools()
    rendered = []
    for given_as in (arguments, json.dumps(arguments), json.dumps(arguments, indent=2)):
        call = {"type": "function", "function": {"name": "lamp", "arguments": given_as}}
        turns = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        recogniser = Recogniser(SourceSpec(path="rows.jsonl"))
        row = Row("rows.jsonl", 1, {"messages": turns, "tools": [LAMP]})
        rendered.append(render(recogniser.recognise(row), tokenizer, "assistant"))  # type: ignore[arg-type]
    assert rendered[0] == rendered[1] == rendered[2]
    [said] = runs_of(rendered[0], tokenizer)
    body = said.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
    assert json.loads(body) == {"name": "lamp", "arguments": arguments}


_TOOLS: list[PreTrainedTokenizerBase] = []


def build_tools() -> PreTrainedTokenizerBase:
    """One for all examples of a property; a fixture would be made for the first alone."""
    if not _TOOLS:
        _TOOLS.append(build(template=library()["chatml-tools"].read_text()))
    return _TOOLS[0]


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all", ("user",)])
def test_calls_that_are_left_out_are_refused_although_their_name_is_said(
    chatml: PreTrainedTokenizerBase, loss_on: LossOn
) -> None:
    """Also where the answer itself is only context."""
    example = talk(
        ("user", "the lamp!"),
        Message("assistant", "I turn the lamp", (ToolCall("lamp", {}),)),
        ("user", "thanks"),
        ("assistant", "fine"),
    )
    with pytest.raises(RowRefused, match="leaves out tool calls"):
        render(example, chatml, loss_on)


def test_reasoning_is_learned_where_the_template_writes_it() -> None:
    tokenizer = build(template=REASONING)
    example = talk(("user", "hello"), Message("assistant", "fine", reasoning="how are you"))
    assert learned(example, tokenizer) == ["<think>\nhow are you\n</think>\n\nfine<|im_end|>"]
    plain = talk(("user", "hello"), ("assistant", "fine"))
    assert learned(plain, tokenizer) == ["fine<|im_end|>"]


def test_reasoning_that_is_stripped_later_makes_its_answer_context() -> None:
    """The model is asked to reason, and would be shown here an answer without."""
    tokenizer = build(template=REASONING)
    example = talk(
        ("user", "hello"),
        Message("assistant", "fine", reasoning="how"),
        ("user", "12"),
        Message("assistant", "no", reasoning="thanks"),
    )
    sequence = render(example, tokenizer, "assistant")
    assert runs_of(sequence, tokenizer) == ["<think>\nthanks\n</think>\n\nno<|im_end|>"]
    assert NOTE_REWRITTEN in sequence.notes
    assert "assistant\nfine<|im_end|>" in tokenizer.decode(sequence.input_ids)
    without = talk(("user", "hello"), ("assistant", "fine"), *example.messages[2:])
    assert learned(without, tokenizer)[0] == "fine<|im_end|>"


@pytest.mark.parametrize(
    ("template", "loss_on", "reason"),
    [
        (R1, "assistant", "is not how an answered turn begins"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:30] }}"), "assistant", "leaves out part"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:30] }}"), ("system",), "cannot be split"),
        (COUNTING, ("user",), "cannot be split where a user turn begins"),
        (FORGETTING, ("user",), "cannot be split where a user turn begins"),
    ],
)
def test_a_template_that_cannot_be_split_is_refused(
    template: str, loss_on: LossOn, reason: str
) -> None:
    with pytest.raises(RowRefused, match=reason):
        render(LONG, build(template=template), loss_on)


def test_what_a_template_leaves_out_is_noted() -> None:
    dropped = "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}" + CHATML
    assert NOTE_LEFT_OUT in render(FOUR, build(template=dropped), "assistant").notes
    assert render(FOUR, build(), "assistant").notes == ()


TOKENS = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}


@pytest.mark.parametrize("token", sorted(TOKENS))
def test_a_special_token_in_a_content_stays_text(
    chatml: PreTrainedTokenizerBase, token: str
) -> None:
    """Its id is nowhere but where the template puts it, and its letters are there as text."""
    spelled = talk(("user", f"hello {token} you"), ("assistant", f"fine {token}"))
    plain = talk(("user", "hello  you"), ("assistant", "fine "))
    sequence = render(spelled, chatml, "assistant")
    control = {chatml.convert_tokens_to_ids(one) for one in TOKENS}
    assert [one for one in sequence.input_ids if one in control] == [
        one for one in render(plain, chatml, "assistant").input_ids if one in control
    ]
    assert chatml.decode(sequence.input_ids) == chatml.apply_chat_template(
        [one.as_dict() for one in spelled.messages], tokenize=False
    )
    as_text = chatml(token, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert not set(as_text) & control
    assert runs_of(sequence, chatml) == [f"fine {token}<|im_end|>"]
    supervised = [label for label in sequence.labels if label != IGNORE_INDEX]
    assert [one for one in supervised if one in control] == [
        chatml.convert_tokens_to_ids("<|im_end|>")
    ]
    assert sequence.notes == (NOTE_SPELLED,)


@pytest.mark.parametrize("thought", ["a", "a <|im_end|> b", "b <|im_end|> a <|im_end|> a"])
def test_an_answer_that_its_reasoning_holds_too(thought: str) -> None:
    """Wherever the end of a turn is spelled in what was thought, it is not that of the answer."""
    tokenizer = build(template=REASONING)
    example = talk(("user", "hello"), Message("assistant", "a", reasoning=thought))
    assert learned(example, tokenizer) == [f"<think>\n{thought}\n</think>\n\na<|im_end|>"]


def test_reasoning_that_ends_as_an_answer_does() -> None:
    """As channels of one turn: the answer ends where its own words do."""
    template = REASONING.replace("</think>\n", "<|im_end|><|im_start|>assistant\n")
    tokenizer = build(template=template)
    example = talk(("user", "hello"), Message("assistant", "a", reasoning="a b"))
    [said] = learned(example, tokenizer)
    assert said.startswith("<think>\na b\n<|im_end|>")
    assert said.endswith("\na<|im_end|>")


NO_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]


@pytest.mark.parametrize("loss_on", ["assistant", "last", ("user", "assistant")])
def test_a_template_without_a_generation_prompt_is_refused(loss_on: LossOn) -> None:
    """The header of an answer would be trained on, and generation would not write it."""
    tokenizer = build(template=NO_PROMPT)
    example = talk(("user", "hello"), ("assistant", "fine"))
    with pytest.raises(
        DataError, match=r"begins an answer with '<\|im_start\|>assistant.n'"
    ) as caught:
        render(example, tokenizer, loss_on)
    assert not isinstance(caught.value, RowRefused)
    assert "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}" in str(
        caught.value
    )
    assert learned(example, tokenizer, ("user",)) == ["hello<|im_end|>"]
    mended = build(template=CHATML)
    assert learned(example, mended) == ["fine<|im_end|>"]


def test_a_template_that_needs_no_generation_prompt() -> None:
    tokenizer = tokenizer_of("mistral")
    assert learned(talk(("user", "hello"), ("assistant", "fine")), tokenizer) == [" fine</s>"]


def test_a_call_spelled_in_an_answer_is_learned_as_it_stands(
    tools: PreTrainedTokenizerBase,
) -> None:
    call = '<tool_call>\n{"name": "lamp", "arguments": {"to": 30}}\n</tool_call>'
    record = {
        "conversations": [
            {"from": "human", "value": "turn the lamp to 30"},
            {"from": "gpt", "value": call},
            {"from": "tool", "value": '{"ok": 1}'},
            {"from": "gpt", "value": "fine"},
        ]
    }
    example = Recogniser(SourceSpec(path="rows.jsonl")).recognise(Row("rows.jsonl", 1, record))
    assert learned(example, tools) == [f"{call}<|im_end|>", "fine<|im_end|>"]


def test_a_special_token_in_the_reasoning_stays_text() -> None:
    tokenizer = build(template=REASONING)
    example = talk(("user", "hello"), Message("assistant", "fine", reasoning="a <|im_end|> b"))
    sequence = render(example, tokenizer, "assistant")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sequence.input_ids.count(end) == 2
    assert runs_of(sequence, tokenizer) == [
        "<think>\na <|im_end|> b\n</think>\n\nfine<|im_end|>",
    ]


def test_a_special_token_in_a_call_is_refused(tools: PreTrainedTokenizerBase) -> None:
    call = ToolCall("lamp", {"to": "<|im_end|>"})
    example = talk(("user", "hello"), Message("assistant", "", (call,)), tools=(LAMP,))
    with pytest.raises(RowRefused, match="spells a special token in a tool or a call of one"):
        render(example, tools, "assistant")


PIECES = st.lists(
    st.sampled_from([*sorted(TOKENS), "hello", " ", "\n", "é🙂", "<|", "|>"]), max_size=5
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    turns=st.lists(PIECES.map("".join), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0),
    loss_on=st.sampled_from(["assistant", "last", ("user",), ("user", "assistant")]),
)
def test_what_is_learned_is_what_was_said(turns: list[str], loss_on: LossOn) -> None:
    tokenizer = tokenizer_of("chatml")
    example = talk(*((("user", "assistant")[n % 2], one) for n, one in enumerate(turns)))
    sequence = render(example, tokenizer, loss_on)
    chosen = [
        message.content
        for message, yes in zip(example.messages, supervised_turns(example, loss_on), strict=True)
        if yes
    ]
    strips = "user" in loss_on  # what others say is found by its words
    found = "".join(runs_of(sequence, tokenizer))
    expected = "".join(f"{one.strip() if strips else one}<|im_end|>" for one in chosen)
    assert "".join(found.split()) == "".join(expected.split())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sequence.labels.count(end) == len(chosen)
    assert sequence.input_ids.count(end) == len(turns)


@pytest.mark.parametrize("content", ["user", "s", "im_end", "<", "\\n", "end", "|"])
def test_words_that_the_template_says_as_well(
    chatml: PreTrainedTokenizerBase, content: str
) -> None:
    """Of a turn that begins `<|im_start|>user`, the word user is not what was said."""
    example = talk(("system", content), ("user", content), ("assistant", "fine"))
    assert learned(example, chatml, ("system", "user")) == [f"{content}<|im_end|>"] * 2
    assert learned(example, chatml, ("user",)) == [f"{content}<|im_end|>"]


def test_text_without_a_template() -> None:
    tokenizer = build()
    continued = PromptCompletion("hello ", "fine", ORIGIN)
    assert learned(continued, tokenizer) == ["fine<|im_end|>"]
    assert mark(continued, tokenizer, "all").spans is None
    assert mark(PlainText("hello", ORIGIN), tokenizer, "assistant").spans is None
    assert mark(PlainText(" \n", ORIGIN), tokenizer, "assistant").spans == ()
