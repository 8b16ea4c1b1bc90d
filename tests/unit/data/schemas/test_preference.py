"""`preference`: every way to write two answers to one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, Message, Preference, PromptCompletion
from qlora_kit.data.schemas import Recogniser

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
    row,
    source,
)

WORSE = {"role": "assistant", "content": "who cares"}
SAID_WORSE = Message("assistant", "who cares")
HUMAN = {"from": "human", "value": "hello"}
GPT = {"from": "gpt", "value": "fine"}
GPT_WORSE = {"from": "gpt", "value": "who cares"}
TEXTS = {"chosen": "fine", "rejected": "who cares"}
TURNS = {"chosen": [ANSWER], "rejected": [WORSE]}
WHOLE = {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}


def conversations(*prompt: Message) -> Preference:
    chosen, rejected = (
        Conversation((*prompt, answer), ORIGIN, len(prompt)) for answer in (SAID_ANSWER, SAID_WORSE)
    )
    return Preference(chosen, rejected, ORIGIN)


def texts(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(
        PromptCompletion(prompt, chosen, ORIGIN), PromptCompletion(prompt, rejected, ORIGIN), ORIGIN
    )


@pytest.mark.parametrize(
    "record",
    [
        WHOLE,
        {"prompt": "hello", **WHOLE},
        {"prompt": [USER], **WHOLE, "messages": [USER, ANSWER], "score_chosen": 9.5},
        {"prompt": [USER], **TURNS},
        {"prompt": [USER], "chosen": ANSWER, "rejected": WORSE},
        {"prompt": [USER], **TEXTS},
        {"prompt": "hello", **TURNS},
        {"question": "hello", "chosen": ANSWER, "rejected": WORSE},
        {"instruction": "hello", "input": "", **TEXTS},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT_WORSE},
        {"conversations": [HUMAN], **TEXTS},
        {"messages": [USER], "chosen": ANSWER, "rejected": WORSE},
    ],
)  # fmt: skip
def test_one_turn(record: dict[str, Any]) -> None:
    assert read(record) == conversations(SAID_USER)


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [SYSTEM, USER, ANSWER, USER, ANSWER],
         "rejected": [SYSTEM, USER, ANSWER, USER, WORSE]},
        {"prompt": [SYSTEM, USER, ANSWER, USER], **TURNS},
        {"prompt": [USER, ANSWER, USER], "system": "be brief", **TURNS},
        {"conversations": [USER, ANSWER, USER], "system": "be brief", **TEXTS},
        {"instruction": "hello", "history": [["hello", "fine"]], "system": "be brief", **TEXTS},
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE],
         "system": "be brief"},
    ],
)  # fmt: skip
def test_a_longer_prompt(record: dict[str, Any]) -> None:
    assert read(record) == conversations(SAID_SYSTEM, SAID_USER, SAID_ANSWER, SAID_USER)


def test_answers_of_several_turns() -> None:
    """The first answer that differs ends the prompt; what follows it may be of any length."""
    record = {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, WORSE]}
    example = read(record)
    assert isinstance(example, Preference)
    assert isinstance(example.chosen, Conversation)
    assert example.chosen.num_given == 1
    assert len(example.chosen.messages) == 4


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Q: ", "chosen": " A", "rejected": " B"}, texts("Q: ", " A", " B")),
        ({"query": "Q: ", "chosen": "A", "rejected": "B"}, texts("Q: ", "A", "B")),
        (
            {"chosen": "Human: hi\n\nAI: fine, so", "rejected": "Human: hi\n\nAI: fine so"},
            texts("Human: hi\n\nAI:", " fine, so", " fine so"),
        ),
        ({"chosen": "a b  c", "rejected": "a b  d"}, texts("a b", "  c", "  d")),
        ({"chosen": "a yes", "rejected": "a yesterday"}, texts("a", " yes", " yesterday")),
    ],
)
def test_texts(record: dict[str, Any], expected: Preference) -> None:
    assert read(record) == expected


def test_a_mapped_prompt_goes_before() -> None:
    record = {"prompt": "other", "q": "hello", "turns": [USER], **TEXTS}
    columns: dict[str, str]
    for columns in ({"instruction": "q"}, {"messages": "turns"}):
        assert read(record, columns=columns) == conversations(SAID_USER)
    assert read(record, columns={"query": "q"}) == texts("hello", "fine", "who cares")


def test_tools() -> None:
    example = read({**WHOLE, "tools": [{"name": "sum"}]})
    assert isinstance(example, Preference)
    for answer in (example.chosen, example.rejected):
        assert isinstance(answer, Conversation)
        assert answer.tools == ({"type": "function", "function": {"name": "sum"}},)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**TEXTS, "rejected": None}, "rejected is null"),
        ({**TEXTS, "prompt": "Q", "rejected": 5}, "rejected is a number"),
        ({**TEXTS, "prompt": "Q", "chosen": " "}, "chosen is empty"),
        ({**TEXTS, "prompt": "Q", "chosen": "\ud800"}, "half a surrogate pair"),
        ({**TEXTS, "prompt": 5}, "prompt is a number"),
        ({**TEXTS, "prompt": " "}, "prompt is empty"),
        ({**TEXTS, "prompt": "Q", "question": "Q"}, "several keys for the prompt"),
        ({**TEXTS, "prompt": "Q", "system": "be brief"}, "no place for system"),
        ({**TEXTS, "prompt": "Q", "tools": [{"name": "sum"}]}, "no place for tools"),
        ({**TEXTS, "prompt": "Q", "context": "a page"}, "no place for context"),
        ({**WHOLE, "images": ["a.png"]}, "no place for images"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are the same"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]},
         "chosen and rejected are the same"),
        ({"prompt": [USER], "chosen": ANSWER, "rejected": GPT},
         "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": "A", "rejected": [WORSE]},
         "chosen and rejected are of two forms"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"chosen": "yes", "rejected": "yesterday"}, "no prompt"),
        ({"chosen": "a b", "rejected": "a b c"}, None),
        ({"chosen": "a b ", "rejected": "a b"}, None),
        (TURNS, "no prompt"),
        ({"chosen": [], "rejected": [WORSE]}, "chosen is empty"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, WORSE]},
         "chosen and rejected answer different prompts"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]},
         "chosen and rejected answer different prompts"),
        ({"chosen": [USER, ANSWER, {**USER, "content": "x"}, ANSWER],
          "rejected": [USER, ANSWER, {**USER, "content": "y"}, WORSE]},
         "chosen and rejected answer different prompts"),
        ({"prompt": "other", **WHOLE}, "the prompt is not that of the conversations"),
        ({"prompt": [SYSTEM, USER], **WHOLE}, "the prompt is not that of the conversations"),
        ({"prompt": [USER, ANSWER], **TURNS}, "two assistant turns in a row"),
        ({"chosen": [USER, ANSWER, USER], "rejected": [USER, WORSE]}, "ends with a user turn"),
        ({"prompt": [USER], "chosen": {**ANSWER, "content": None}, "rejected": WORSE},
         "content is null"),
    ],
)  # fmt: skip
def test_faults(record: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        assert isinstance(read(record), Preference)
    else:
        assert reason(record) == expected


def test_real_pairs(shared_data: Path) -> None:
    recogniser = Recogniser(source())
    for record in json.loads((shared_data / "preference" / "dpo_en_demo.json").read_text("utf-8")):
        example = recogniser.recognise(row(record))
        assert isinstance(example, Preference)
        given = [turn["value"] for turn in record["conversations"]]
        for answer, key in (example.chosen, "chosen"), (example.rejected, "rejected"):
            assert isinstance(answer, Conversation)
            said = [message.content for message in answer.messages]
            assert said == [*given, record[key]["value"]]
            assert answer.num_given == len(given)
    assert recogniser.schema == "preference"
