"""Values are shown briefly and safely, whatever they are."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from qlora_kit.data.schemas.fields import MAX_DEPTH, Unfit, json_value, kind, names, preview, shown

DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (5, "5"),
        (0.5, "0.5"),
        ("a\n\x1b[0m", '"a\\n\\u001b[0m"'),
        ("\ud800", '"\\ud800"'),
        ("日", '"日"'),
        ("x" * 61, '"' + "x" * 60 + '…"'),
        ([], "an empty list"),
        (DEEP, "a list of 1"),
        ({}, "an empty object"),
        ({"a": DEEP, "b\n": 1}, "an object of a, 'b\\n'"),
        (b"x", "binary data"),
        (datetime.date(2026, 1, 1), "a date"),
    ],
)
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


def test_a_number_of_thousands_of_digits() -> None:
    assert shown(10**5000) == "a number"


def test_names_are_cut() -> None:
    assert names(str(number) for number in range(20)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …"
    assert len(preview({f"{number}" * 99: "x" * 10**6 for number in range(99)})) < 1500


def test_depth() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = (value,)
    json_value(value, "arguments")
    for deeper in ([value], DEEP):
        with pytest.raises(Unfit, match="arguments are nested too deeply"):
            json_value(deeper, "arguments")


def test_a_copy_is_json() -> None:
    given = {"a": (1, 2.5, None, True, "x"), "b": {}}
    value = json_value(given, "arguments")
    assert value == {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert kind(value["a"]) == "a list"
