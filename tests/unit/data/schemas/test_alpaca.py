"""`alpaca`: an instruction and its output, after what else was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.schemas import Recogniser

from .rows import ORIGIN, SAID_ANSWER, SAID_SYSTEM, SAID_USER, read, reason, refusal, row, source

PLAIN = {"instruction": "hello", "output": "fine"}


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({}, (SAID_USER, SAID_ANSWER)),
        ({"input": "", "text": "x", "history": [], "system": ""}, (SAID_USER, SAID_ANSWER)),
        ({"input": None, "history": None, "system": None}, (SAID_USER, SAID_ANSWER)),
        ({"input": " \n", "system": " ", "history": ""}, (SAID_USER, SAID_ANSWER)),
        (
            {"input": " 12", "system": "be brief"},
            (SAID_SYSTEM, Message("user", "hello\n\n 12"), SAID_ANSWER),
        ),
        (
            {"history": [["hello", "fine"], ("hello", "fine")]},
            (SAID_USER, SAID_ANSWER) * 3,
        ),
    ],
)
def test_conversations(fields: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert read({**PLAIN, **fields}) == Conversation(messages, ORIGIN)


def test_tools() -> None:
    example = read({**PLAIN, "tools": [{"name": "sum"}]})
    assert isinstance(example, Conversation)
    assert len(example.tools) == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"output": None}, "output is null"),
        ({"output": 5}, "output is a number"),
        ({"output": False}, "output is a boolean"),
        ({"output": ["fine"]}, "output is a list"),
        ({"output": ""}, "output is empty"),
        ({"output": " \n"}, "output is empty"),
        ({"output": "\ud83d"}, "half a surrogate pair"),
        ({"instruction": None}, "instruction is null"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": 7}, "instruction is a number"),
        ({"input": 7}, "input is a number"),
        ({"input": {}}, "input is an object"),
        ({"system": 7}, "system is a number"),
        ({"history": "hello"}, "history is a text"),
        ({"history": ["hello"]}, "history is no list of pairs"),
        ({"history": [["hello"]]}, "history is no list of pairs"),
        ({"history": [["hello", None]]}, "a turn of the history is null"),
        ({"history": [["hello", ""]]}, "a turn of the history is empty"),
        ({"images": ["a.png"]}, "no place for images"),
        ({"context": "a page"}, "no place for context"),
    ],
)
def test_faults(fields: dict[str, Any], expected: str) -> None:
    assert reason({**PLAIN, **fields}) == expected


def test_details() -> None:
    for value, detail in (7, "output is 7"), (["a"], "output is a list of 1"), (None, ""), ("", ""):
        assert refusal({**PLAIN, "output": value}).detail == detail
    assert refusal({**PLAIN, "history": [["a", ""]]}).detail == "history[0]"
    assert refusal({**PLAIN, "history": [["a", None]]}).detail == "history[0]"
    assert refusal({**PLAIN, "output": "a\ud800"}).detail == "output, character 1"


def test_real_instructions(shared_data: Path) -> None:
    recogniser = Recogniser(source())
    records = json.loads((shared_data / "zh" / "alpaca_zh_demo.json").read_text("utf-8"))
    for record in records:
        example = recogniser.recognise(row(record))
        assert isinstance(example, Conversation)
        question, answer = example.messages
        assert answer.content == record["output"]
        assert question.content.startswith(record["instruction"])
        assert question.content.endswith(record["input"])
    assert recogniser.schema == "alpaca"
