"""`messages`: every form of a turn that has one meaning, and the faults of a turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, Message, ToolCall

from .rows import (
    ANSWER,
    CALL,
    ORIGIN,
    SAID_ANSWER,
    SAID_SYSTEM,
    SAID_USER,
    SYSTEM,
    USER,
    read,
    reason,
    refusal,
)

DEEP: Any = "bottom"
for _ in range(150):
    DEEP = [DEEP]

SUM = ToolCall("sum", {"of": [1, 2]})
RESULT = {"role": "tool", "content": "3"}


def said(*turns: dict[str, Any], **beside: Any) -> tuple[Message, ...]:
    example = read({"messages": list(turns), **beside})
    assert isinstance(example, Conversation)
    assert example.origin == ORIGIN
    assert example.num_given == 0
    return example.messages


def fault(turn: dict[str, Any]) -> str:
    """Of the answer to a question."""
    return reason({"messages": [USER, turn]})


def test_system_user_assistant() -> None:
    assert said(SYSTEM, USER, ANSWER) == (SAID_SYSTEM, SAID_USER, SAID_ANSWER)
    assert said(USER, ANSWER, system="be brief") == (SAID_SYSTEM, SAID_USER, SAID_ANSWER)
    assert said(SYSTEM, USER, ANSWER, system="be brief")[:2] == (SAID_SYSTEM, SAID_USER)
    assert said(USER, ANSWER, system=" ", prompt="x", id=3) == (SAID_USER, SAID_ANSWER)


@pytest.mark.parametrize(
    "turn",
    [
        {**USER, "name": "Ann", "id": 7, "weight": 1, "tool_calls": None, "images": []},
        {"role": " User", "content": "hello", "train": None, "reasoning": ""},
        {
            "role": "human",
            "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
        },
        {"role": "HUMAN", "content": [{"type": "text", "text": "hello", "image_url": None}]},
        {"from": "human", "value": "hello"},
    ],
)
def test_forms_of_a_user_turn(turn: dict[str, Any]) -> None:
    assert said(turn, ANSWER) == (SAID_USER, SAID_ANSWER)


def test_a_list_as_text() -> None:
    example = read({"messages": json.dumps([USER, ANSWER])})
    assert example == Conversation((SAID_USER, SAID_ANSWER), ORIGIN)


@pytest.mark.parametrize("role", ["assistant", "gpt", "bot", "model", "ai", "ChatGPT"])
def test_names_of_the_assistant(role: str) -> None:
    assert said(USER, {"role": role, "content": "fine"}) == (SAID_USER, SAID_ANSWER)


@pytest.mark.parametrize("role", ["function", "ipython", "observation", "tool_response", "tool"])
def test_names_of_a_tool(role: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}
    result = {"role": role, "content": "", "name": "sum", "tool_call_id": "c1"}
    assert said({"role": "developer", "content": "be brief"}, USER, call, result, ANSWER) == (
        SAID_SYSTEM,
        SAID_USER,
        Message("assistant", "", (SUM,)),
        Message("tool", "", name="sum", tool_call_id="c1"),
        SAID_ANSWER,
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": [{"id": None, "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}]},
        {"content": "", "tool_calls": [CALL], "function_call": None},
        {
            "content": [],
            "tool_calls": '[{"function": {"name": "sum", "arguments": {"of": [1,2]}}}]',
        },
        {"content": None, "function_call": {"name": "sum", "arguments": '{"of": [1, 2]}'}},
        {"role": "function_call", "content": '{"name": "sum", "arguments": {"of": [1, 2]}}'},
        {"role": "tool_call", "content": '[{"name": "sum", "arguments": "{\\"of\\": [1, 2]}"}]'},
    ],
)
def test_forms_of_a_call(turn: dict[str, Any]) -> None:
    assert said(USER, {"role": "assistant", **turn}) == (
        SAID_USER,
        Message("assistant", "", (SUM,)),
    )


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_no_arguments(arguments: Any) -> None:
    call = {"id": "c1", "function": {"name": "now", "arguments": arguments}}
    turn = {"role": "assistant", "content": "wait", "tool_calls": [call]}
    assert said(USER, turn)[1] == Message("assistant", "wait", (ToolCall("now", {}, "c1"),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reasoning_content": "so"}, Message("assistant", "fine", reasoning="so")),
        ({"reasoning": "so", "thinking": None}, Message("assistant", "fine", reasoning="so")),
        ({"thinking": "so", "reasoning": "so"}, Message("assistant", "fine", reasoning="so")),
        ({"thinking": " "}, SAID_ANSWER),
        ({"train": False}, Message("assistant", "fine", train=False)),
        ({"train": True, "weight": 1}, Message("assistant", "fine", train=True)),
        ({"weight": 0}, Message("assistant", "fine", train=False)),
        ({"weight": 1.0}, Message("assistant", "fine", train=True)),
    ],
)
def test_fields_of_an_answer(fields: dict[str, Any], message: Message) -> None:
    assert said(USER, {**ANSWER, **fields}) == (SAID_USER, message)


def test_train_on_what_a_user_says() -> None:
    assert said({**USER, "train": True, "weight": 0}, ANSWER)[0] == Message(
        "user", "hello", train=True
    )


@pytest.mark.parametrize("content", ["\0", "\x1b[0m \x07", "a\u2028b", "<|im_end|>", "é" * 10**6])
def test_content_is_kept_as_it_is(content: str) -> None:
    assert said({"role": "user", "content": content}, ANSWER)[0].content == content


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": None}, "content is null"),
        ({"content": 5}, "content is a number"),
        ({"content": 0.5}, "content is a number"),
        ({"content": True}, "content is a boolean"),
        ({"content": {"text": "fine"}}, "content is an object"),
        ({"content": b"fine"}, "content is binary data"),
        ({"content": ""}, "an empty turn"),
        ({"content": " \n\t"}, "an empty turn"),
        ({"content": []}, "an empty turn"),
        ({"content": ["fine"]}, "a content part is a text"),
        ({"content": [{"type": "text", "text": 5}]}, "text of a content part is a number"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "a content part of type image_url"),
        ({"content": [{"type": "input_audio"}]}, "a content part of type input_audio"),
        ({"content": [{"text": "fine"}]}, "a content part of type null"),
        ({"images": ["a.png"]}, "images in a turn"),
        ({"content": "a\ud800"}, "half a surrogate pair"),
        ({"content": [{"type": "text", "text": "\udfff"}]}, "half a surrogate pair"),
        ({"reasoning": "\ud800"}, "half a surrogate pair"),
        ({"reasoning": 5}, "reasoning is a number"),
        ({"reasoning": "so", "thinking": "not so"}, "two kinds of reasoning"),
        ({"role": "asistant"}, "unknown role"),
        ({"role": 5}, "role is a number"),
        ({"role": None}, "a turn without a role"),
        ({"train": 1}, "train is a number"),
        ({"train": "false"}, "train is a text"),
        ({"weight": 0.5}, "weight is neither 0 nor 1"),
        ({"weight": True}, "weight is neither 0 nor 1"),
        ({"weight": "1"}, "weight is neither 0 nor 1"),
        ({"weight": 0, "train": True}, "train and weight disagree"),
        ({"tool_calls": 5}, "tool_calls is a number"),
        ({"tool_calls": "sum(1)"}, "tool calls are not JSON"),
        ({"tool_calls": ["sum"]}, "a tool call is a text"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "a tool call without a name"),
        ({"tool_calls": [{"function": "sum"}]}, "a tool call without a name"),
        ({"tool_calls": [{"function": {"name": 5}}]}, "name of a tool call is a number"),
        ({"tool_calls": [{"function": {"name": " "}}]}, "name of a tool call is empty"),
        ({"tool_calls": [{"id": 5, "function": CALL}]}, "id of a tool call is a number"),
        ({"tool_calls": [{"type": "custom", "custom": {}}]}, "a tool call of another type"),
        ({"tool_calls": [{"name": "sum", "arguments": "1 + 2"}]}, "arguments are not JSON"),
        ({"tool_calls": [{"name": "sum", "arguments": "[1]"}]}, "arguments are not an object"),
        ({"tool_calls": [{"name": "sum", "arguments": 5}]}, "arguments are not an object"),
        ({"tool_calls": [{"name": "sum", "arguments": '{"a": NaN}'}]}, "arguments are not JSON"),
        ({"tool_calls": [{"name": "sum", "arguments": '{"a": 1, "a": 2}'}]},
         "arguments are not JSON"),
        ({"tool_calls": [{"name": "sum", "arguments": '{"a": %s}' % ("9" * 5000)}]},
         "arguments are not JSON"),
        ({"tool_calls": [{"name": "sum", "arguments": "[" * 100_000}]},
         "arguments are nested too deeply"),
        ({"tool_calls": [{"name": "sum", "arguments": {"a": DEEP}}]},
         "arguments are nested too deeply"),
        ({"tool_calls": [{"name": "sum", "arguments": {"a": float("inf")}}]},
         "arguments hold inf, which is not JSON"),
        ({"tool_calls": [{"name": "sum", "arguments": {"a": "\ud800"}}]}, "half a surrogate pair"),
        ({"tool_calls": [CALL], "function_call": CALL}, "tool_calls and function_call in one turn"),
        ({"role": "function_call", "content": "sum(1)"}, "tool calls are not JSON"),
        ({"role": "function_call", "content": "[]"}, "a tool call without a name"),
    ],
)  # fmt: skip
def test_faults_of_a_turn(fields: dict[str, Any], expected: str) -> None:
    assert fault({**ANSWER, **fields}) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ({"role": "user"}, "messages is an object"),
        ("hello", "messages is a text"),
        ("[hello]", "messages are not JSON"),
        (None, "messages is null"),
        (["hello"], "a turn is a text"),
        ([USER, {"role": "assistant"}], "a turn without content"),
        ([USER, {"content": "fine"}], "a turn without a role"),
        ([{**USER, "reasoning": "so"}, ANSWER], "reasoning of a user turn"),
        ([{**USER, "tool_calls": [CALL]}, ANSWER], "tool calls of a user turn"),
        ([USER, {**ANSWER, "tool_calls": [CALL]}, {**RESULT, "name": 5}, ANSWER],
         "name of a tool result is a number"),
        ([USER, {**ANSWER, "tool_calls": [CALL]}, {**RESULT, "content": None}, ANSWER],
         "content is null"),
    ],
)  # fmt: skip
def test_faults_of_the_list(messages: Any, expected: str) -> None:
    assert reason({"messages": messages}) == expected


def test_details_say_where() -> None:
    assert "messages[1].content is 5" in str(
        refusal({"messages": [USER, {**ANSWER, "content": 5}]})
    )
    near = refusal({"messages": [USER, {**ANSWER, "role": "asistant"}]})
    assert "did you mean assistant?" in near.detail
    odd = refusal({"messages": [USER, {**ANSWER, "role": "\x1b[31m\ud800" * 100}]})
    assert str(odd).isprintable()
    assert len(str(odd)) < 600


def test_system_prompts_that_differ() -> None:
    assert reason({"messages": [SYSTEM, USER, ANSWER], "system": "be long"}) == "two system prompts"
    assert reason({"messages": [USER, ANSWER], "system": 5}) == "system is a number"
    assert (
        reason({"messages": [USER, ANSWER], "system_prompt": "x"}) == "no place for system_prompt"
    )
