"""`kto`: a rating beside any form of an answer."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, PromptCompletion, Rated
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import Recogniser
from qlora_kit.errors import DataError

from .rows import ANSWER, ORIGIN, SAID_ANSWER, SAID_USER, USER, read, reason, row, source

TEXTS = {"prompt": "Q: ", "completion": " A"}
TURNS = [USER, ANSWER, USER, ANSWER]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "fine"}] * 2
SAID = (SAID_USER, SAID_ANSWER) * 2


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *((one, True) for one in (True, "true", 1, 1.0, "1", "1.0", " TRUE ")),
        *((one, False) for one in (False, " False", 0, 0.0, "0", "0.0", "0\n")),
    ],
)
def test_ratings(key: str, given: Any, wanted: bool) -> None:
    expected = Rated(PromptCompletion("Q: ", " A", ORIGIN), wanted, ORIGIN)
    assert read({**TEXTS, key: given}) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"conversations": SHAREGPT},
        {"prompt": TURNS[:-1], "completion": TURNS[-1:]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"instruction": "hello", "output": "fine", "history": [["hello", "fine"]]},
    ],
)
def test_the_last_answer_is_rated(record: dict[str, Any]) -> None:
    expected = Rated(Conversation(SAID, ORIGIN, num_given=3), False, ORIGIN)
    assert read({**record, "label": False}) == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**TEXTS, "label": None}, "label is null"),
        ({**TEXTS, "label": float("nan")}, "label is null"),
        ({**TEXTS, "label": " "}, "label is a text"),
        ({**TEXTS, "label": True, "completion": None}, "completion is null"),
        ({**TEXTS, "label": True, "completion": ""}, "completion is empty"),
        ({**TEXTS, "label": True, "system": "be brief"}, "no place for system"),
        ({**TEXTS, "label": True, "kto_tag": False}, "several keys for the rating"),
        ({**TEXTS, "label": True, "images": ["a.png"]}, "no place for images"),
        ({"messages": [USER], "label": True}, "no answer"),
        ({"messages": None, "label": True}, "messages is null"),
    ],
)
def test_faults(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected
    assert reason(record, needs_answer=False) == expected


def test_another_label_is_no_rating() -> None:
    for label in ("arithmetic", "good", 5, 0.5, -1, "2", "10", [1]):
        recogniser = Recogniser(source())
        example = recogniser.recognise(row({**TEXTS, "label": label}))
        assert example == PromptCompletion("Q: ", " A", ORIGIN)
        assert recogniser.ignored_keys == ("label",)


def test_another_label_among_ratings() -> None:
    recogniser = Recogniser(source())
    recogniser.recognise(row({**TEXTS, "label": True}))
    for label in ("good", 5, "2", 0.5, None):
        with pytest.raises(RowRefused, match="label is"):
            recogniser.recognise(row({**TEXTS, "label": label}))
    with pytest.raises(DataError, match="different schemas"):
        recogniser.recognise(row(TEXTS))


def test_named() -> None:
    assert reason({**TEXTS, "label": "good"}, type="kto") == "label is a text"
    assert reason({"text": "a", "label": True}, type="kto") == "nothing is rated"
    with pytest.raises(DataError, match=r"rows\.jsonl:7 has no label, which type: kto needs"):
        read(TEXTS, type="kto")
    assert read({**TEXTS, "label": True}, type="prompt_completion") == PromptCompletion(
        "Q: ", " A", ORIGIN
    )
