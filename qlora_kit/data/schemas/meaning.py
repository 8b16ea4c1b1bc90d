"""What of an example fine-tuning trains on, and when two examples say the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from qlora_kit.data.examples import (
    AnyExample,
    Conversation,
    Example,
    Message,
    PlainText,
    Preference,
    PromptCompletion,
    Rated,
)

_KEY_BYTES = 16
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def fine_tuning_example(example: AnyExample) -> Example | None:
    """The chosen of two answers, and a rated one that is wanted; None for one that is not."""
    if isinstance(example, Preference):
        return example.chosen
    if isinstance(example, Rated):
        return example.answer if example.wanted else None
    return example


def content_key(example: AnyExample) -> bytes:
    """16 bytes that two examples share exactly when they say the same.

    What is said: roles, texts, reasoning, calls with their arguments, whose result a tool's
    turn is, and tools; of pairs and ratings all of it. Not: where it came from, ids of calls,
    and what of it is trained on.
    """
    text = _ENCODER.encode(_said(example))
    return hashlib.blake2b(text.encode("ascii"), digest_size=_KEY_BYTES).digest()


def _said(example: AnyExample) -> list[Any]:
    if isinstance(example, Conversation):
        return ["chat", [_turn(message) for message in example.messages], example.tools]
    if isinstance(example, PromptCompletion):
        return ["completion", example.prompt, example.completion]
    if isinstance(example, PlainText):
        return ["text", example.text]
    if isinstance(example, Preference):
        return ["preference", _said(example.chosen), _said(example.rejected)]
    return ["rated", _said(example.answer), example.wanted]


def _turn(message: Message) -> list[Any]:
    turn: list[Any] = [message.role, message.content]
    if message.tool_calls or message.reasoning is not None or message.name is not None:
        calls = [[call.name, call.arguments] for call in message.tool_calls]
        turn += [calls, message.reasoning, message.name]
    return turn
