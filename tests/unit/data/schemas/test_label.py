"""`label`: a text is the question, its class the answer."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.schemas import Recogniser

from .rows import ORIGIN, SAID_USER, read, reason, row, source


@pytest.mark.parametrize("text", ["text", "sentence", "utterance", "review", "content"])
@pytest.mark.parametrize("label", ["label", "category", "intent", "class", "label_text"])
def test_keys(text: str, label: str) -> None:
    expected = Conversation((SAID_USER, Message("assistant", "greeting")), ORIGIN)
    assert read({text: "hello", label: "greeting", "idx": 5}) == expected


@pytest.mark.parametrize(
    ("label", "written"),
    [(3, "3"), (-1, "-1"), (0, "0"), (True, "true"), (False, "false"), ("no ", "no ")],
)
def test_labels(label: Any, written: str) -> None:
    example = read({"text": "hello", "label": label})
    assert isinstance(example, Conversation)
    assert example.messages[1] == Message("assistant", written)


def test_the_name_of_a_label() -> None:
    record = {"text": "hello", "label": 7, "label_text": "greeting"}
    for fields, written in ({}, "greeting"), ({"columns": {"label": "label"}}, "7"):
        example = read(record, **fields)
        assert isinstance(example, Conversation)
        assert example.messages[1].content == written


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "label": None}, "label is null"),
        ({"text": None, "label": "b"}, "text is null"),
        ({"text": "a", "label": 0.5}, "label is a fraction"),
        ({"text": "a", "label": 1.0}, "label is a fraction"),
        ({"text": "a", "label": float("nan")}, "label is null"),
        ({"text": "a", "label": 10**5000}, "label is a number"),
        ({"text": "a", "label": ["b"]}, "label is a list"),
        ({"text": "a", "label": ""}, "label is empty"),
        ({"text": 5, "label": "b"}, "text is a number"),
        ({"text": " ", "label": "b"}, "text is empty"),
        ({"text": "a", "label": "b", "intent": "c"}, "several keys for the label"),
        ({"text": "a", "sentence": "b", "label": "c"}, "several keys for the text"),
        ({"sentence": "a", "question": "b", "label": 1}, "no place for question"),
        ({"text": "a", "label": 1, "image": "a.png"}, "no place for image"),
    ],
)
def test_faults(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected


def test_real_classes(shared_data: Path) -> None:
    recogniser = Recogniser(source())
    with (shared_data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            example = recogniser.recognise(row(record))
            assert isinstance(example, Conversation)
            said = [message.content for message in example.messages]
            assert said == [record["text"], record["category"]]
    assert recogniser.describe() == "label: a text and its class (text, category)"
    assert recogniser.ignored_keys == ()
