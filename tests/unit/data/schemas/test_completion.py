"""`prompt_completion`: joined as they stand, or a conversation whose prompt is given."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, PromptCompletion

from .rows import (
    ANSWER,
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


@pytest.mark.parametrize("prompt", ["prompt", "question", "query", "input"])
@pytest.mark.parametrize("completion", ["completion", "response", "output", "answer", "target"])
def test_texts(prompt: str, completion: str) -> None:
    record = {prompt: "Q: ", completion: " A\0", "text": None, "id": 5}
    assert read(record) == PromptCompletion("Q: ", " A\0", ORIGIN)


def test_messages() -> None:
    """What is in the prompt is given: its answers are not trained on."""
    prompt = [SYSTEM, USER, ANSWER, USER]
    expected = Conversation(
        (SAID_SYSTEM, SAID_USER, SAID_ANSWER, SAID_USER, SAID_ANSWER),
        ORIGIN,
        4,
        ({"type": "function", "function": {"name": "sum"}},),
    )
    tools = [{"name": "sum"}]
    assert read({"prompt": prompt, "completion": [ANSWER], "tools": tools}) == expected
    assert read({"question": prompt, "answer": ANSWER, "tools": tools}) == expected


def test_the_mapped_key_is_meant() -> None:
    record = {"prompt": "a", "question": "b", "answer": "c"}
    assert reason(record) == "several keys for the prompt"
    assert "prompt and question" in refusal(record).detail
    mapped = read(record, columns={"prompt": "question", "completion": "answer"})
    assert mapped == PromptCompletion("b", "c", ORIGIN)
    assert read({**record, "prompt": ""}) == mapped
    assert (
        reason({"prompt": "a", "answer": "c", "output": "d"}) == "several keys for the completion"
    )


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": None, "completion": "b"}, "prompt is null"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"prompt": "a", "completion": 5}, "completion is a number"),
        ({"prompt": 5, "completion": "b"}, "prompt is a number"),
        ({"question": "a", "answer": " "}, "completion is empty"),
        ({"prompt": "", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair"),
        ({"prompt": [USER], "completion": "b"}, "prompt and completion are of two forms"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt and completion are of two forms"),
        ({"prompt": [USER], "completion": []}, "completion is empty"),
        ({"prompt": [], "completion": [ANSWER]}, "prompt is empty"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "no answer"),
        ({"prompt": [USER], "completion": [USER, ANSWER]}, "two user turns in a row"),
        ({"prompt": [USER], "completion": [ANSWER, USER]}, "ends with a user turn"),
        ({"prompt": [USER], "completion": [{**ANSWER, "content": None}]}, "content is null"),
        ({"prompt": "a", "completion": "b", "tools": [{"name": "sum"}]}, "no place for tools"),
        ({"prompt": "a", "completion": "b", "system": "be brief"}, "no place for system"),
        ({"question": "a", "answer": "b", "context": "a page"}, "no place for context"),
        ({"instruction": "a", "input": "b", "response": "c"}, "no place for instruction"),
        ({"question": "a", "answer": "b", "image": "a.png"}, "no place for image"),
    ],
)
def test_faults(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected


def test_empty_fields_that_would_matter() -> None:
    record = {"prompt": "a", "completion": "b", "tools": "[]", "system": "", "context": None}
    assert read(record) == PromptCompletion("a", "b", ORIGIN)


def test_all_is_trained_on() -> None:
    example = read({"prompt": [USER], "completion": [ANSWER, USER]}, needs_answer=False)
    assert isinstance(example, Conversation)
    assert len(example.messages) == 3
