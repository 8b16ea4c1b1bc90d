"""What is trained on, and when two examples say the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_kit.data.examples import (
    AnyExample,
    Conversation,
    Message,
    PlainText,
    Preference,
    PromptCompletion,
    Rated,
    ToolCall,
)
from qlora_kit.data.schemas import content_key, fine_tuning_example

from .rows import ANSWER, USER, read

BETTER = PromptCompletion("a", "b", "x:1")
WORSE = PromptCompletion("a", "c", "x:1")
CALL = Message("assistant", "", (ToolCall("f", {"a": 1, "b": [True]}, "c1"),))
CHAT = Conversation((Message("user", "hello"), CALL), "x:1")
TOOL = {"type": "function", "function": {"name": "f"}}


def test_fine_tuning_example() -> None:
    for example in (BETTER, CHAT, PlainText("a", "x:1")):
        assert fine_tuning_example(example) is example
    assert fine_tuning_example(Preference(BETTER, WORSE, "x:1")) is BETTER
    assert fine_tuning_example(Rated(BETTER, True, "x:1")) is BETTER
    assert fine_tuning_example(Rated(BETTER, False, "x:1")) is None


def chat(**fields: Any) -> Conversation:
    """CHAT, with another call."""
    return replace(CHAT, messages=(CHAT.messages[0], replace(CALL, **fields)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (CHAT, replace(CHAT, origin="y:2", num_given=1)),
        (CHAT, chat(train=False)),
        (CHAT, chat(tool_calls=(ToolCall("f", {"b": [True], "a": 1}),))),
        (
            replace(CHAT, tools=(TOOL,)),
            replace(CHAT, tools=({"function": {"name": "f"}, "type": "function"},)),
        ),
        (BETTER, replace(BETTER, origin="y:2")),
        (Rated(BETTER, True, "x:1"), Rated(BETTER, True, "x:2")),
    ],
)
def test_the_same(one: AnyExample, other: AnyExample) -> None:
    assert content_key(one) == content_key(other)
    assert len(content_key(one)) == 16


DIFFERENT: list[AnyExample] = [
    CHAT,
    chat(content="so"),
    chat(reasoning="so"),
    chat(role="tool"),
    chat(tool_calls=()),
    chat(tool_calls=(ToolCall("f", {"a": 1, "b": [1]}),)),
    chat(tool_calls=(ToolCall("f", {"a": 1, "b": ["True"]}),)),
    chat(tool_calls=(ToolCall("g", {"a": 1, "b": [True]}),)),
    chat(tool_calls=CALL.tool_calls * 2),
    replace(CHAT, messages=CHAT.messages[:1]),
    replace(CHAT, messages=CHAT.messages[::-1]),
    replace(CHAT, tools=(TOOL,)),
    replace(CHAT, tools=(TOOL, TOOL)),
    Conversation((Message("user", "a"), Message("assistant", "b")), "x:1"),
    Conversation((Message("user", "a\ud800"),), "x:1"),
    BETTER,
    WORSE,
    PromptCompletion("ab", "", "x:1"),
    PromptCompletion("", "ab", "x:1"),
    PlainText("ab", "x:1"),
    Preference(BETTER, WORSE, "x:1"),
    Preference(WORSE, BETTER, "x:1"),
    Rated(BETTER, True, "x:1"),
    Rated(BETTER, False, "x:1"),
]


def test_not_the_same() -> None:
    assert len({content_key(example) for example in DIFFERENT}) == len(DIFFERENT)


def test_arguments_as_object_or_as_text() -> None:
    """Whitespace and the order of keys say nothing."""
    keys = set()
    for arguments in ({"a": 1, "b": 2}, '{"b":2, "a" : 1}', {"b": 2, "a": 1}):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        keys.add(content_key(read({"messages": [USER, {**ANSWER, "tool_calls": calls}]})))
    assert len(keys) == 1
