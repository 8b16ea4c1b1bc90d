"""A missing value that an export wrote as a word is noted, whatever the schema."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.schemas import fine_tuning_example
from qlora_kit.data.schemas.nulls import NOTE_NULL_WORD, WORDS
from qlora_kit.data.schemas.preference import NOTE_REJECTED

from .rows import ANSWER, CALL, USER, read

NONE = {"role": "assistant", "content": "None"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def notes_of(record: dict[str, Any], **fields: Any) -> tuple[str, ...]:
    example = fine_tuning_example(read(record, **fields))
    assert example is not None
    return example.notes


@pytest.mark.parametrize("word", [*sorted(WORDS), " None\n"])
def test_words(word: str) -> None:
    assert notes_of({"text": word}) == (NOTE_NULL_WORD,)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, NONE]},
        {"messages": [{"role": "user", "content": "nan"}, ANSWER]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "null"}]},
        {"instruction": "a", "input": "nan", "output": "b"},
        {"instruction": "a", "output": "None"},
        {"prompt": "a", "completion": "NULL"},
        {"prompt": "None", "completion": "b", "label": True},
        {"text": "a", "label": "None"},
    ],
)
def test_fields(record: dict[str, Any]) -> None:
    """One note for a row, and the row is there: a class may be called None."""
    assert notes_of(record) == (NOTE_NULL_WORD,)


def test_pairs() -> None:
    for key in PAIR:
        assert notes_of({**PAIR, key: "None"}) == (NOTE_REJECTED, NOTE_NULL_WORD)


@pytest.mark.parametrize(
    "record",
    [
        {"text": "None of them"},
        {"text": "none"},
        {"text": "a", "meta": "None"},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "None"},
                ANSWER,
            ]
        },
    ],
)
def test_what_is_no_such_word(record: dict[str, Any]) -> None:
    assert notes_of(record) == ()


def test_a_mapped_field() -> None:
    assert notes_of({"a": "None"}, columns={"text": "a"}) == (NOTE_NULL_WORD,)
