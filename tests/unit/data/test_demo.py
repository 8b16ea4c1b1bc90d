"""The built-in task: deterministic, verifiable, and held out by slot pairs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict

import pytest

from qlora_kit.data.demo import (
    ACTIONS,
    NUM_ROWS,
    combinations,
    command_examples,
    demo_rows,
    say_time,
    spell,
)
from qlora_kit.errors import DataError

SPLITS = ("train", "test")
ACTION_OF = {action.name: action for action in ACTIONS}
PINNED_SHA256 = {
    "train": "8f35c2c7aca96450f1229bd5018db2250f80cf4b92e1f2fa6d43ab4384ede40e",
    "test": "e384d6be30ecd9f14cfa5967a7ad35bc304f174562c5fa00147f819136e03db1",
}


def answers(split: str) -> set[str]:
    return {row["messages"][-1]["content"] for row in demo_rows("commands", split)}


def texts(split: str) -> list[str]:
    return [row["messages"][1]["content"] for row in demo_rows("commands", split)]


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_are_pinned(split: str) -> None:
    """A change of the task changes every figure measured on it, so it must not go unnoticed."""
    rows = demo_rows("commands", split)
    assert rows == demo_rows("commands", split)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == PINNED_SHA256[split]


@pytest.mark.parametrize("split", SPLITS)
def test_counts_and_shape(split: str) -> None:
    rows = demo_rows("commands", split)
    assert len(rows) == NUM_ROWS[split]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    per_action = Counter(example.action for example in command_examples(split))
    assert set(per_action) == set(ACTION_OF)
    assert max(per_action.values()) - min(per_action.values()) <= 1


def test_there_are_thousands_of_combinations() -> None:
    counts = {split: sum(len(combinations(a, split)) for a in ACTIONS) for split in SPLITS}
    assert counts["train"] > 2500
    assert counts["test"] > 600


def test_no_combination_text_or_answer_is_in_both_splits() -> None:
    for action in ACTIONS:
        train, test = (
            {tuple(slots.items()) for slots in combinations(action, split)} for split in SPLITS
        )
        assert train
        assert test
        assert not train & test
    assert not set(texts("train")) & set(texts("test"))
    assert not answers("train") & answers("test")


def test_the_split_slots_never_meet_in_training() -> None:
    """Stronger than unseen combinations: the two slots were never seen together."""

    def pairs(split: str) -> set[object]:
        return {
            (example.action, *(dict(example.slots)[slot] for slot in action.split_by))
            for example in command_examples(split)
            for action in [ACTION_OF[example.action]]
        }

    assert not pairs("train") & pairs("test")


def test_every_value_and_phrase_of_the_test_split_is_trained_on() -> None:
    """Otherwise an unseen combination would hold an unknowable part."""
    trained = {
        (example.action, slot, value)
        for example in command_examples("train")
        for slot, value in example.slots
    }
    for example in command_examples("test"):
        for slot, value in example.slots:
            assert (example.action, slot, value) in trained


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_its_slots_as_strict_json(split: str) -> None:
    for example in command_examples(split):
        assert "\n" not in example.answer
        parsed = json.loads(example.answer)
        assert list(parsed) == ["action", *ACTION_OF[example.action].slots]
        assert parsed.pop("action") == example.action
        assert parsed == dict(example.slots)
        assert json.dumps(json.loads(example.answer), separators=(",", ":")) == example.answer


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_says_its_slots(split: str) -> None:
    for example in command_examples(split):
        phrases = ACTION_OF[example.action].slots
        for slot, value in example.slots:
            assert any(phrase in example.text for phrase in phrases[slot][value])


def test_no_two_answers_share_a_text() -> None:
    """Over every phrasing of every combination, not only those drawn."""
    meaning: dict[str, str] = {}
    for action in ACTIONS:
        for slot, phrases in action.slots.items():
            for value, ways in phrases.items():
                for way in ways:
                    key = f"{action.name} {slot} {way}"
                    assert meaning.setdefault(key, str(value)) == str(value)


def test_phrasing_varies() -> None:
    for action in ACTIONS:
        assert len(set(action.templates)) >= 5
        for template in action.templates:
            assert all(template.count("{" + slot + "}") == 1 for slot in action.slots)
    said: dict[str, set[str]] = defaultdict(set)
    for example in command_examples("train"):
        said[example.answer].add(example.text)
    assert max(len(ways) for ways in said.values()) >= 3
    assert len(set(texts("train"))) == NUM_ROWS["train"]


def test_answers_are_not_copied_from_the_text() -> None:
    """Most rows hold a value that the text does not contain letter by letter."""
    examples = command_examples("test")
    normalised = [e for e in examples if any(str(value) not in e.text for _, value in e.slots)]
    assert len(normalised) >= 0.6 * len(examples)


def test_looking_up_the_nearest_training_text_scores_nothing() -> None:
    train = [(set(example.text.split()), example.answer) for example in command_examples("train")]
    for example in command_examples("test"):
        words = set(example.text.split())
        nearest = max(train, key=lambda known: len(words & known[0]) / len(words | known[0]))
        assert nearest[1] != example.answer


@pytest.mark.parametrize(
    ("hour", "minute", "half_of_day", "ways"),
    [
        (7, 0, "am", ("seven o'clock in the morning", "7 am")),
        (11, 30, "am", ("half past eleven in the morning", "11 30 am")),
        (5, 0, "pm", ("five o'clock in the afternoon", "5 pm")),
        (6, 30, "pm", ("half past six in the evening", "6 30 pm")),
    ],
)
def test_times_of_day(hour: int, minute: int, half_of_day: str, ways: tuple[str, str]) -> None:
    assert say_time(hour, minute, half_of_day) == ways


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (12, "twelve"),
        (13, "thirteen"),
        (20, "twenty"),
        (95, "ninety five"),
    ],
)
def test_spelled_numbers(number: int, words: str) -> None:
    assert spell(number) == words


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(DataError, match="demo/orders; known: demo/commands"):
        demo_rows("orders", "train")
    with pytest.raises(DataError, match="'validation'; known: train, test"):
        demo_rows("commands", "validation")
