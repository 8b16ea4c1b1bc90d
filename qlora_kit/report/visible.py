"""Text of a data set made safe and short enough to look at."""

from __future__ import annotations

import re
from collections.abc import Sequence

LINE_BREAK = "↵"
_MOST_OF_A_RUN = 800

# What moves a cursor, changes a terminal's state, or turns the direction of the text around it.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)


def visible(text: str) -> str:
    """The text on one line: line breaks as ↵, other control characters by their pictures or
    numbers, so that no data can steer a terminal.
    """
    return _CONTROLS.sub(_picture, text)


def bracketed(runs: Sequence[tuple[str, bool]]) -> str:
    """Stretches of text as one, those that are trained on between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if supervised and text else text for text, supervised in runs)


def shortened(text: str, most: int = _MOST_OF_A_RUN) -> str:
    """The beginning and the end of a text, and how much is left out between."""
    left_out = len(text) - most
    if left_out <= most // 10:
        return text
    half = most // 2
    return f"{text[:half]} […{left_out:,} characters…] {text[-half:]}"


def _picture(found: re.Match[str]) -> str:
    code = ord(found.group())
    if found.group() == "\n":
        return LINE_BREAK
    if found.group() == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{code:04X}⟩"
