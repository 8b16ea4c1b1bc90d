"""`sharegpt`: from and value mean what role and content do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, Message, ToolCall
from qlora_kit.data.schemas import Recogniser

from .rows import (
    ANSWER,
    CALL,
    SAID_ANSWER,
    SAID_SYSTEM,
    SAID_USER,
    USER,
    read,
    reason,
    row,
    source,
)

HUMAN = {"from": "human", "value": "hello"}
GPT = {"from": "gpt", "value": "fine"}
CALLS = {"from": "function_call", "value": json.dumps(CALL)}
RESULT = {"from": "observation", "value": "3"}
SUM = ToolCall("sum", {"of": [1, 2]})


def said(*turns: dict[str, Any], **beside: Any) -> tuple[Message, ...]:
    example = read({"conversations": list(turns), **beside})
    assert isinstance(example, Conversation)
    return example.messages


@pytest.mark.parametrize("key", ["conversations", "conversation"])
@pytest.mark.parametrize("turns", [[HUMAN, GPT], [USER, ANSWER], [HUMAN, ANSWER]])
def test_keys(key: str, turns: list[dict[str, str]]) -> None:
    example = read({key: turns, "id": "identity_0"})
    assert isinstance(example, Conversation)
    assert example.messages == (SAID_USER, SAID_ANSWER)


def test_both_keys() -> None:
    record = {"conversations": [HUMAN, GPT], "conversation": [HUMAN, GPT]}
    assert reason(record) == "several keys for the conversation"
    assert read({**record, "conversation": None}) == read({"conversation": [HUMAN, GPT]})


def test_system_and_tools_beside() -> None:
    record = {"conversations": [HUMAN, GPT], "system": "be brief", "tools": '[{"name": "sum"}]'}
    example = read(record)
    assert isinstance(example, Conversation)
    assert example.messages == (SAID_SYSTEM, SAID_USER, SAID_ANSWER)
    assert example.tools == ({"type": "function", "function": {"name": "sum"}},)
    turn = {"from": "system", "value": "be brief"}
    assert said(turn, HUMAN, GPT, system="") == example.messages
    assert reason({"conversations": [turn, HUMAN, GPT], "system": "no"}) == "two system prompts"


def test_calls() -> None:
    assert said(HUMAN, CALLS, RESULT, GPT) == (
        SAID_USER,
        Message("assistant", "", (SUM,)),
        Message("tool", "3"),
        SAID_ANSWER,
    )


def test_a_call_belongs_to_the_turn_before_it() -> None:
    """Calls are turns of their own here, however many one answer makes."""
    assert said(HUMAN, {**GPT, "reasoning": "so"}, CALLS, CALLS, RESULT, RESULT, GPT) == (
        SAID_USER,
        Message("assistant", "fine", (SUM, SUM), reasoning="so"),
        Message("tool", "3"),
        Message("tool", "3"),
        SAID_ANSWER,
    )
    several = {"from": "function_call", "value": json.dumps([CALL, CALL])}
    assert said(HUMAN, several) == said(HUMAN, CALLS, CALLS)
    assert said(HUMAN, {**GPT, "weight": 0}, CALLS)[1].train is False


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([HUMAN, {"from": "gpt", "value": None}], "content is null"),
        ([HUMAN, {"from": "gpt", "value": 5}], "content is a number"),
        ([HUMAN, {"from": "gpt"}], "a turn without content"),
        ([HUMAN, {"from": "gpt", "value": " "}], "an empty turn"),
        ([HUMAN, {"from": "narrator", "value": "so"}], "unknown role"),
        ([HUMAN, {"value": "so"}], "a turn without a role"),
        ([HUMAN, {**CALLS, "value": "sum(1, 2)"}], "tool calls are not JSON"),
        ([HUMAN, {**CALLS, "value": "5"}], "a tool call is a number"),
        ([HUMAN, {**CALLS, "value": '{"arguments": {}}'}], "a tool call without a name"),
        ([HUMAN, GPT, RESULT, GPT], "a tool result without a call"),
        ([HUMAN, HUMAN, GPT], "two user turns in a row"),
        ([HUMAN], "no answer"),
        ([], "conversations is empty"),
        ("hello", "conversations is a text"),
    ],
)
def test_faults(turns: Any, expected: str) -> None:
    assert reason({"conversations": turns}) == expected


def test_real_conversations(shared_data: Path) -> None:
    records = json.loads((shared_data / "fastchat" / "dummy_conversation.json").read_text())
    recogniser = Recogniser(source())
    for record in records:
        example = recogniser.recognise(row(record))
        assert isinstance(example, Conversation)
        given = [turn["value"] for turn in record["conversations"]]
        assert [message.content for message in example.messages] == given
    assert recogniser.describe() == "sharegpt: conversations of from/value"
    assert recogniser.ignored_keys == ("id",)
