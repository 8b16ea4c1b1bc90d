"""What a row means, and that nothing in it is guessed, converted or skipped in silence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qlora_kit.data.read import Row
from qlora_kit.data.schema import (
    SCHEMAS,
    Conversation,
    PlainText,
    PromptCompletion,
    schema_of,
    to_example,
    to_examples,
)
from qlora_kit.errors import DataError

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "fine"}
SYSTEM = {"role": "system", "content": "be brief"}
ORIGIN = "rows.jsonl:7"


def row(record: dict[str, Any], number: int = 7) -> Row:
    return Row("rows.jsonl", number, record)


def refusal(record: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        to_example(row(record))
    message = str(caught.value)
    assert message.startswith(ORIGIN)
    return message


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, ANSWER]}, (USER, ANSWER)),
        ({"messages": [SYSTEM, USER, ANSWER], "id": 3, "prompt": "x"}, (SYSTEM, USER, ANSWER)),
        ({"messages": [{**USER, "name": "Ann", "weight": 1}, ANSWER]}, (USER, ANSWER)),
        ({"messages": [USER, {**ANSWER, "tool_calls": None, "train": True}]}, (USER, ANSWER)),
        ({"instruction": "hello", "output": "fine"}, (USER, ANSWER)),
        ({"instruction": "hello", "input": "", "output": "fine", "text": "x"}, (USER, ANSWER)),
        ({"instruction": "hello", "input": None, "output": "fine"}, (USER, ANSWER)),
        ({"instruction": "hello", "input": " \n", "output": "fine"}, (USER, ANSWER)),
        (
            {"instruction": "hello", "input": " 12", "output": "fine", "system": "be brief"},
            (SYSTEM, {"role": "user", "content": "hello\n\n 12"}, ANSWER),
        ),
        ({"instruction": "hello", "output": "fine", "system": "", "history": []}, (USER, ANSWER)),
    ],
)
def test_conversations(record: dict[str, Any], messages: tuple[dict[str, str], ...]) -> None:
    assert to_example(row(record)) == Conversation(messages, ORIGIN)


def test_prompt_and_completion_as_texts() -> None:
    example = to_example(row({"prompt": "Q: ", "completion": " A ", "text": None}))
    assert example == PromptCompletion("Q: ", " A ", ORIGIN)


def test_prompt_and_completion_as_messages() -> None:
    """What is in the prompt is given: its answers are not trained on."""
    prompt = [USER, ANSWER, USER]
    example = to_example(row({"prompt": prompt, "completion": [ANSWER]}))
    assert example == Conversation((*prompt, ANSWER), ORIGIN, num_given=3)


def test_text() -> None:
    assert to_example(row({"text": " a\n", "label": True})) == PlainText(" a\n", ORIGIN)


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({"messages": [], "text": "x"}, "messages"),
        ({"messages": None, "text": "x"}, "text"),
        ({"prompt": "x", "completion": "y", "text": "z"}, "prompt, completion"),
        ({"prompt": "x", "completion": None, "text": "z"}, "text"),
    ],
)
def test_the_first_schema_that_fits(record: dict[str, Any], schema: str) -> None:
    assert schema_of(row(record)) == schema
    assert schema in SCHEMAS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "has the keys (none), which fit no known schema. Known: messages (a list of"),
        ({"prompt": "x", "completion": None}, "has the keys completion (null), prompt, which"),
        ({"question": "x", "answer": "y"}, "has the keys answer, question, which"),
        ({"Text": "x"}, "Did you mean text by Text?"),
        ({"message": [USER]}, "Did you mean messages by message?"),
        ({"instruction": "x", "response": "y"}, "has the keys instruction, response, which"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "ShareGPT conversations are not"),
        ({"data": [{"text": "x"}]}, "If the objects in 'data' are the rows, make that list"),
        ({f"k{n}": n for n in range(30)}, "k0, k1, k10, k11, k12, k13, k14, k15, k16, k17, k18"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "is a preference"),
        ({"prompt": "x", "completion": "y", "label": False}, "is a preference"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "holds tools, which"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "holds images, which"),
        ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "holds history, which"),
    ],
)
def test_no_known_schema(record: dict[str, Any], message: str) -> None:
    assert message in refusal(record)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], ": messages must be a list with at least one message, got an empty list."),
        ("hello", ": messages must be a list with at least one message, got a str."),
        (USER, ": messages must be a list with at least one message, got an object."),
        (["hello"], ": messages[0] must be an object with role and content, got a str."),
        ([USER, {"role": "assistant"}], ": messages[1] has no content; its keys are role."),
        ([{"from": "human", "value": "x"}], "[0] has no role and no content; its keys are from"),
        ([{"role": "human", "content": "x"}], "got 'human'; did you mean user?"),
        ([USER, {"role": "gpt", "content": "x"}], "[1].role must be one of system, user, assistan"),
        ([USER, {"role": "gpt", "content": "x"}], "got 'gpt'; did you mean assistant?"),
        ([{"role": "asistant", "content": "x"}], "got 'asistant'; did you mean assistant?"),
        ([{"role": "User ", "content": "x"}], "got 'User '; did you mean user?"),
        ([{"role": "developer", "content": "x"}], "did you mean system?"),
        ([{"role": "tool", "content": "x"}], "tool calls and their results are not read"),
        ([{"role": "wizard", "content": "x"}], "got 'wizard'."),
        ([{"role": None, "content": "x"}], "got None."),
        ([{"role": ["user"], "content": "x"}], "got ['user']."),
        ([{"role": "user", "content": None}], "messages[0].content must be text, got null."),
        ([{"role": "user", "content": 12}], ".content must be text, got 12, which is not in quot"),
        ([{"role": "user", "content": True}], ".content must be text, got true, which is not in"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be text, got a list of 1."),
        ([{"role": "user", "content": "a\ud800b"}], "half of a surrogate pair (character 1)"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "messages[1] holds tool_calls, which"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], "messages[1] holds reasoning_content"),
        ([USER, {**ANSWER, "weight": 0}], "messages[1] holds weight, which"),
        ([USER, {**ANSWER, "train": False}], "messages[1] holds train, which"),
    ],
)
def test_what_is_wrong_with_messages(messages: Any, message: str) -> None:
    assert message in refusal({"messages": messages})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 12}, ": text must be text, got 12, which is not in quotes."),
        ({"text": ["a", "b"]}, ": text must be text, got a list of 2."),
        ({"text": "\udc00"}, "half of a surrogate pair"),
        ({"prompt": "x", "completion": 3}, ": completion must be text, got 3, which is not in"),
        ({"prompt": [USER], "completion": "y"}, "prompt is a list of 1 and completion a str; give"),
        ({"prompt": [], "completion": [ANSWER]}, ": prompt must be a list with at least one messa"),
        ({"prompt": [USER], "completion": [{"role": "gpt"}]}, "completion[0] has no content"),
        ({"instruction": 1, "output": "y"}, ": instruction must be text, got 1"),
        ({"instruction": "x", "output": 1.5}, ": output must be text, got 1.5"),
        ({"instruction": "x", "input": 0, "output": "y"}, ": input must be text, got 0"),
        ({"instruction": "x", "input": math.nan, "output": "y"}, ": input must be text, got nan"),
        ({"instruction": "x", "system": 1, "output": "y"}, ": system must be text, got 1"),
    ],
)
def test_fields_of_another_type_are_not_converted(record: dict[str, Any], message: str) -> None:
    assert message in refusal(record)


def test_a_source_holds_one_schema() -> None:
    rows = [row({"text": "a"}, 1), row({"text": "b"}, 2), row({"messages": [USER]}, 3)]
    assert to_examples(rows[:2]) == [PlainText("a", "rows.jsonl:1"), PlainText("b", "rows.jsonl:2")]
    with pytest.raises(DataError) as caught:
        to_examples(rows)
    assert str(caught.value).startswith(
        "rows.jsonl:3 is of the schema “messages”, but rows.jsonl:1 of “text”."
    )
