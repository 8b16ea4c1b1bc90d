"""JSON for people and other programs."""

from __future__ import annotations

import json
import math

import pytest

from qlora_kit.records import json_text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_has_no_number_for_is_null(value):
    given = {"a": value, "b": [1.5, (value, {"c": value})], "é": "NaN", "d": True, "n": 3}
    text = json_text(given)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, [None, {"c": None}]],
        "é": "NaN",
        "d": True,
        "n": 3,
    }
    assert "é" in text
