"""From a record to what it means: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kit.data.read import Row
from qlora_kit.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each `{"role": …, "content": …}`, rendered by the chat template."""

    messages: tuple[dict[str, str], ...]
    origin: str


@dataclass(frozen=True)
class PromptCompletion:
    """Text and how it goes on, joined as they stand, without a chat template."""

    prompt: str
    completion: str
    origin: str


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is trained on."""

    text: str
    origin: str


Example = Conversation | PromptCompletion | PlainText

SCHEMAS = {
    "messages": 'a list of {"role", "content"}',
    "prompt, completion": "two texts, or two lists of messages",
    "instruction, input (optional), output": "alpaca; system is optional",
    "text": "plain text",
}


def to_example(row: Row) -> Example:
    """Recognise the row's schema by its keys.

    Raises:
        DataError: no schema fits, or a field has the wrong type; names file and row.
    """
    record = row.record
    if "messages" in record:
        return _conversation(row, record["messages"])
    if "prompt" in record and "completion" in record:
        return _prompt_completion(row)
    if "instruction" in record and "output" in record:
        return _alpaca(row)
    if "text" in record:
        return PlainText(_text(row, "text"), row.origin)
    known = "; ".join(f"{keys} ({meaning})" for keys, meaning in SCHEMAS.items())
    raise DataError(
        f"{row.origin} has the keys {sorted(record)}, which fit no known schema: {known}."
    )


def _conversation(row: Row, messages: Any) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(
            f"{row.origin}: messages must be a list with at least one message."
        )
    return Conversation(
        tuple(
            _message(row, number, message) for number, message in enumerate(messages)
        ),
        row.origin,
    )


def _message(row: Row, number: int, message: Any) -> dict[str, str]:
    where = f"{row.origin}: messages[{number}]"
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content.")
    if message.get("tool_calls"):
        raise DataError(
            f"{where} holds tool_calls, which this version cannot train on."
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}."
        )
    if not isinstance(content, str):
        raise DataError(f"{where}.content must be text, got {type(content).__name__}.")
    return {"role": role, "content": content}


def _prompt_completion(row: Row) -> Example:
    prompt, completion = row.record["prompt"], row.record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(row, [*prompt, *completion])
    return PromptCompletion(_text(row, "prompt"), _text(row, "completion"), row.origin)


def _alpaca(row: Row) -> Conversation:
    instruction, given = _text(row, "instruction"), row.record.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(
            f"{row.origin}: input must be text, got {type(given).__name__}."
        )
    messages = []
    if row.record.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    messages.append(
        {
            "role": "user",
            "content": f"{instruction}\n\n{given}" if given else instruction,
        }
    )
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(tuple(messages), row.origin)


def _text(row: Row, key: str) -> str:
    value = row.record[key]
    if not isinstance(value, str):
        raise DataError(
            f"{row.origin}: {key} must be text, got {type(value).__name__}."
        )
    return value
