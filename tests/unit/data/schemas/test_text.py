"""`text`: plain text, as it stands."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import PlainText

from .rows import ORIGIN, read, reason


@pytest.mark.parametrize("key", ["text", "content"])
@pytest.mark.parametrize("text", [" a\n", "\0", "\r\n\u2028x", "x" * 10**6, "日本"])
def test_text(key: str, text: str) -> None:
    assert read({key: text, "meta": {"url": "x"}}) == PlainText(text, ORIGIN)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": None}, "text is null"),
        ({"text": 5}, "text is a number"),
        ({"text": True}, "text is a boolean"),
        ({"text": ["a"]}, "text is a list"),
        ({"content": ""}, "text is empty"),
        ({"text": "\n \t"}, "text is empty"),
        ({"text": "a\udc00"}, "half a surrogate pair"),
        ({"text": "a", "content": "b"}, "several keys for the text"),
        ({"text": "a", "audio": {"bytes": b"x"}}, "no place for audio"),
    ],
)
def test_faults(record: dict[str, Any], expected: str) -> None:
    assert reason(record) == expected
