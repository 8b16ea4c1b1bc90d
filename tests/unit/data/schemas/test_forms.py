"""One conversation, written in several schemas, is one conversation."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.data.examples import Conversation, Message, Preference, ToolCall
from qlora_kit.data.schemas import content_key

from .rows import ORIGIN, read

sound = st.text(st.characters(exclude_categories=["Cs"]))
full = sound.filter(lambda text: bool(text) and not text.isspace())
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | sound | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(sound, inner, max_size=2),
    max_leaves=4,
)
calls = st.builds(ToolCall, full, st.dictionaries(sound, plain, max_size=2))


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """Any that is in order, and ends with an answer."""
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(full)))
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(full)))
        for _ in range(draw(st.integers(0, 2))):
            made = tuple(draw(st.lists(calls, min_size=1, max_size=2)))
            messages.append(Message("assistant", draw(st.just("") | full), made))
            messages += [Message("tool", draw(sound)) for _ in made]
        messages.append(Message("assistant", draw(full)))
    return tuple(messages)


def as_messages(message: Message, as_text: bool, in_parts: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if in_parts:
        turn["content"] = [{"type": "text", "text": one} for one in (message.content, "")]
    if message.tool_calls:
        turn["content"] = turn["content"] if message.content else None
        turn["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments) if as_text else call.arguments,
                },
            }
            for call in message.tool_calls
        ]
    return turn


def as_sharegpt(message: Message) -> list[dict[str, Any]]:
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    if message.content or not message.tool_calls:
        turns.append({"from": names[message.role], "value": message.content})
    for call in message.tool_calls:
        value = json.dumps({"name": call.name, "arguments": call.arguments})
        turns.append({"from": "function_call", "value": value})
    return turns


@given(conversations(), st.booleans(), st.booleans())
def test_messages(messages: tuple[Message, ...], as_text: bool, in_parts: bool) -> None:
    turns = [as_messages(message, as_text, in_parts) for message in messages]
    expected = Conversation(messages, ORIGIN)
    for given_turns in (turns, json.loads(json.dumps(turns))):
        example = read({"messages": given_turns})
        assert example == expected
        assert content_key(example) == content_key(expected)


@given(conversations())
def test_sharegpt(messages: tuple[Message, ...]) -> None:
    turns = [turn for message in messages for turn in as_sharegpt(message)]
    assert read({"conversations": turns}) == Conversation(messages, ORIGIN)


@given(conversations(), full)
def test_preference(messages: tuple[Message, ...], other: str) -> None:
    turns = [as_messages(message, True, False) for message in messages]
    worse = {"role": "assistant", "content": other + messages[-1].content}
    prompt = turns[:-1]
    for record in (
        {"chosen": turns, "rejected": [*prompt, worse]},
        {"prompt": prompt, "chosen": turns[-1:], "rejected": [worse]},
    ):
        example = read(record)
        assert isinstance(example, Preference)
        assert example.chosen == Conversation(messages, ORIGIN, len(prompt))
        assert isinstance(example.rejected, Conversation)
        assert example.rejected.messages[:-1] == messages[:-1]


@given(conversations())
def test_prompt_and_completion(messages: tuple[Message, ...]) -> None:
    turns = [as_messages(message, False, False) for message in messages]
    example = read({"prompt": turns[:-1], "completion": turns[-1:]})
    assert example == Conversation(messages, ORIGIN, len(turns) - 1)
