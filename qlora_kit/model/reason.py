"""Upstream's errors in one line."""

from __future__ import annotations

_MAX_CHARACTERS = 300


def reason_of(error: BaseException) -> str:
    """What an upstream error says, in one line; its type where it says nothing."""
    text = " ".join(str(error).split())
    if not text:
        return type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is not known"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS].rstrip()} …"
