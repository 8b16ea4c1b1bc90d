"""From a record to what it means: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.read import Record, Row
from qlora_kit.errors import DataError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each `{"role": …, "content": …}`, rendered by the chat template.

    The first `num_given` messages are a prompt: no answer among them is trained on.
    """

    messages: tuple[dict[str, str], ...]
    origin: str
    num_given: int = 0


@dataclass(frozen=True)
class PromptCompletion:
    """Text and how it goes on, joined as they stand, without a chat template.

    A special token spelled in either counts as that token.
    """

    prompt: str
    completion: str
    origin: str


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is trained on; a special token spelled in it counts as such."""

    text: str
    origin: str


Example = Conversation | PromptCompletion | PlainText

SCHEMAS = {
    "messages": 'a list of {"role", "content"}',
    "prompt, completion": "two texts, or two lists of messages",
    "instruction, input (optional), output": "alpaca; system is optional",
    "text": "plain text",
}
"""How the keys of a row name its schema; the first that fits is taken."""

_KEYS = (
    ("messages", ("messages",)),
    ("prompt, completion", ("prompt", "completion")),
    ("instruction, input (optional), output", ("instruction", "output")),
    ("text", ("text",)),
)

# Roles as other tools write them.
_OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "developer": "system",
}
_TOOL_ROLES = ("tool", "function", "ipython", "tool_response", "observation")

# Fields of a message, or of a row, that change what is trained; skipping them would be silent.
_UNREAD_IN_MESSAGE = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "weight",
    "train",
)
_UNREAD_IN_ROW = ("tools", "functions", "images", "videos", "audios", "audio")


def to_examples(rows: Iterable[Row]) -> list[Example]:
    """The examples of one source, which are all of one schema.

    Raises:
        DataError: see `to_example`; or two rows have different schemas.
    """
    examples: list[Example] = []
    first: tuple[str, Row] | None = None
    for row in rows:
        schema = schema_of(row)
        first = first or (schema, row)
        if schema != first[0]:
            raise DataError(
                f"{row.origin} is of the schema “{schema}”, but {first[1].origin} of "
                f"“{first[0]}”. Give each its own file, as a source of its own."
            )
        examples.append(to_example(row))
    return examples


def to_example(row: Row) -> Example:
    """Recognise the row's schema by its keys.

    Raises:
        DataError: no schema fits, or a field has the wrong type; names file and row.
    """
    schema = schema_of(row)
    _refuse_unread(row.origin, row.record, _UNREAD_IN_ROW)
    if schema == "messages":
        return _conversation(row, "messages")
    if schema == "prompt, completion":
        return _prompt_completion(row)
    if schema == "text":
        return PlainText(_text(row, "text"), row.origin)
    return _alpaca(row)


def schema_of(row: Row) -> str:
    """The key of `SCHEMAS` that the row's keys fit; a field that is null counts as absent.

    Raises:
        DataError: none does.
    """
    present = {key for key, value in row.record.items() if value is not None}
    rated = "completion" in present and isinstance(row.record.get("label"), bool)
    if {"chosen", "rejected"} <= present or rated:
        raise DataError(
            f"{row.origin} is a preference (chosen and rejected, or a label), "
            "which this version does not read."
        )
    for schema, keys in _KEYS:
        if present.issuperset(keys):
            return schema
    raise DataError(_no_schema(row, present))


def _no_schema(row: Row, present: set[str]) -> str:
    shown = [key if key in present else f"{key} (null)" for key in sorted(row.record)]
    known = "; ".join(f"{keys} ({meaning})" for keys, meaning in SCHEMAS.items())
    message = f"{row.origin} has the keys {', '.join(shown[:12]) or '(none)'}"
    message += ", …" if len(shown) > 12 else ""
    message += f", which fit no known schema. Known: {known}."
    wanted = [key for _, keys in _KEYS for key in keys]
    for key in sorted(present):
        value = row.record[key]
        near = difflib.get_close_matches(key.lower(), wanted, n=1, cutoff=0.8)
        if near and near[0] not in present:
            message += f" Did you mean {near[0]} by {key}?"
        elif key == "conversations":
            message += " ShareGPT conversations are not read; write them as messages."
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            message += f" If the objects in {key!r} are the rows, make that list the file."
    return message


def _conversation(row: Row, *keys: str) -> Conversation:
    """The messages under the last key, with those under the keys before it as a given prompt."""
    messages: list[dict[str, str]] = []
    num_given = 0
    for key in keys:
        given = row.record[key]
        if not isinstance(given, list | tuple) or not given:
            raise DataError(
                f"{row.origin}: {key} must be a list with at least one message, got {_kind(given)}."
            )
        num_given = len(messages)
        messages += [
            _message(f"{row.origin}: {key}[{number}]", message)
            for number, message in enumerate(given)
        ]
    return Conversation(tuple(messages), row.origin, num_given)


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content, got {_kind(message)}.")
    _refuse_unread(where, message, _UNREAD_IN_MESSAGE)
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise DataError(
            f"{where} has no {' and no '.join(missing)}; its keys are "
            f"{', '.join(map(str, message)) or '(none)'}."
        )
    role = message["role"]
    if role not in ROLES:
        raise DataError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {role!r}{_meant(role)}."
        )
    return {"role": role, "content": _checked(f"{where}.content", message["content"])}


def _meant(role: Any) -> str:
    if not isinstance(role, str):
        return ""
    name = role.strip().lower()
    if name in _TOOL_ROLES:
        return "; tool calls and their results are not read by this version"
    near = difflib.get_close_matches(name, ROLES, n=1)
    meant = _OTHER_ROLES.get(name) or (near[0] if near else None)
    return f"; did you mean {meant}?" if meant else ""


def _prompt_completion(row: Row) -> Example:
    kinds = {type(row.record[key]) for key in ("prompt", "completion")}
    if kinds == {list}:
        return _conversation(row, "prompt", "completion")
    if list in kinds:
        raise DataError(
            f"{row.origin}: prompt is {_kind(row.record['prompt'])} and completion "
            f"{_kind(row.record['completion'])}; give two texts, or two lists of messages."
        )
    return PromptCompletion(_text(row, "prompt"), _text(row, "completion"), row.origin)


def _alpaca(row: Row) -> Conversation:
    _refuse_unread(row.origin, row.record, ("history",))
    optional = {
        key: _text(row, key) if row.record.get(key) is not None else ""
        for key in ("input", "system")
    }
    messages = []
    if optional["system"]:
        messages.append({"role": "system", "content": optional["system"]})
    question = _text(row, "instruction")
    if optional["input"].strip():
        question = f"{question}\n\n{optional['input']}"
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(tuple(messages), row.origin)


def _refuse_unread(where: str, record: Record, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = record.get(key)
        if value in (None, "", [], {}) or (key in ("weight", "train") and value in (1, True)):
            continue
        raise DataError(f"{where} holds {key}, which this version cannot train on.")


def _text(row: Row, key: str) -> str:
    return _checked(f"{row.origin}: {key}", row.record[key])


def _checked(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, got {_kind(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half of a surrogate pair (character {error.start}), which is no text."
        ) from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool | int | float):
        return f"{str(value).lower()}, which is not in quotes"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
