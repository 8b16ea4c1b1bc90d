"""What is learnt of a chat template from the outside."""

from __future__ import annotations

import pytest

from qlora_kit.data.render import end_of_turn_id
from qlora_kit.data.template import RowRefused, apply_template, spelled_token, turn_end
from qlora_kit.errors import DataError

from .formats import CHATML, FORMATS, NO_END, R1, build, tokenizer_of

MESSAGES = [{"role": "user", "content": "hello"}]


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
        apply_template(MESSAGES, build(template=template), "rows.jsonl:7")
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
