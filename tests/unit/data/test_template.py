"""What is learnt of a chat template from the outside."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.render import end_of_turn_id
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import added_tokens, apply_template, spelled_tokens, turn_end
from qlora_kit.errors import DataError

from .formats import CHATML, FORMATS, NO_END, R1, build, tokenizer_of

HELLO = Conversation((Message("user", "hello"),), "rows.jsonl:7")


def spelled_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    found = spelled_tokens(tokenizer).search(text)
    return found and found.group()


@pytest.mark.parametrize("name", FORMATS)
def test_the_token_that_ends_a_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    end = turn_end(tokenizer)
    assert end.text == FORMATS[name].end
    assert tokenizer.convert_ids_to_tokens(end.id) == end.text
    assert end_of_turn_id(tokenizer) == end.id


def test_the_end_is_found_whatever_the_prompt_looks_like() -> None:
    """Training on every token needs no prompt, so neither does the end."""
    assert turn_end(build(template=R1)).text == "<|im_end|>"


def test_the_end_is_the_token_right_behind_the_answer() -> None:
    """Some templates close the whole conversation with another token."""
    tokenizer = build(template=CHATML + "{% if messages %}<|endoftext|>{% endif %}")
    assert turn_end(tokenizer).text == "<|im_end|>"


def test_another_template_has_another_end() -> None:
    tokenizer = build()
    assert turn_end(tokenizer).text == "<|im_end|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    assert turn_end(tokenizer).text == "<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_END, "no special token, so the model would never learn to stop"),
        (CHATML.replace("<|im_end|>", " STOP<|im_end|>"), "closes an answer with ' STOP"),
        (CHATML.replace("<|im_end|>", ""), "no special token"),
        ("{{ messages[0].content }}<|im_end|>", "leaves out what the assistant says"),
        (None, "has no chat template"),
    ],
)
def test_no_end(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        turn_end(build(template=template))
    assert not isinstance(caught.value, RowRefused)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\n  such\n role') }}", "no such role"),
        ("{{ messages[7].content + 'x' }}", "has no element 7"),
        ("{{ messages | tojson + 1 }}", "can only concatenate"),
        ("{{ 'x'.y.z }}", "has no attribute 'y'"),
    ],
)
def test_what_fails_in_a_template(template: str, reason: str) -> None:
    with pytest.raises(RowRefused) as caught:
        apply_template(HELLO, build(template=template))
    assert str(caught.value).startswith("rows.jsonl:7: the chat template refuses it: ")
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("text", "token"),
    [("a <a>b", "<a>b"), ("a <a> b", "<a>"), ("[X]", "[X]"), ("a> [x] <s>", None), ("", None)],
)
def test_tokens_that_a_text_spells(text: str, token: str | None) -> None:
    tokenizer = build(("<a>", "<a>b", "[X]"), None, "<a>", CHATML.replace("<|im_end|>", "<a>"))
    assert spelled_token(text, tokenizer) == token


def test_the_end_of_a_turn_counts_as_spelled_although_it_is_not_special() -> None:
    tokenizer = build(template=CHATML.replace("<|im_end|>", "\n</turn>"))
    tokenizer.add_tokens(["</turn>", "\n", "</think>"])
    assert turn_end(tokenizer).text == "</turn>"
    assert spelled_token("a</turn>", tokenizer) == "</turn>"
    assert spelled_token("</think>\n", tokenizer) is None
    assert [found.group() for found in added_tokens(tokenizer).finditer("a</think>\n</turn>")] == [
        "</think>",
        "</turn>",
    ]


def test_the_first_messages_and_the_prompt_for_the_next() -> None:
    talk = Conversation((Message("user", "hello"), Message("assistant", "fine")), "rows.jsonl:7")
    asked = "<|im_start|>user\nhello<|im_end|>\n"
    answered = asked + "<|im_start|>assistant\nfine<|im_end|>\n"
    assert apply_template(talk, build()) == answered
    assert apply_template(talk, build(), 1) == asked
    assert apply_template(talk, build(), 1, prompt=True) == asked + "<|im_start|>assistant\n"
    assert apply_template(talk, build(), prompt=True) == answered + "<|im_start|>assistant\n"


def test_a_conversation_without_a_template_names_the_library() -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:7 holds a conversation.*chatml-tools, chatml, gemma"
    ):
        apply_template(HELLO, build(template=None))


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_tools_reach_the_template_in_one_form(is_wrapped: bool) -> None:
    function = {"name": "lamp", "parameters": {"type": "object"}}
    tool = {"type": "function", "function": function} if is_wrapped else function
    template = "{{ tools[0].type }} {{ tools[0].function.name }}"
    talk = Conversation(HELLO.messages, HELLO.origin, tools=(tool,))
    assert apply_template(talk, build(template=template)) == "function lamp"
    none = "{{ 'none' if tools is none or tools is undefined else tools }}"
    assert apply_template(HELLO, build(template=none)) == "none"
