"""Texts that are nothing but the word for a missing value: `None`, `nan`, `NULL`.

Rule: such a row is kept and noted, not dropped. A broken export writes `str(None)`, but a class may
be called None, and the right answer to a question of code may be `null`; nothing in the row tells
one from the other, and the count does. What a tool returned is not looked at, as a null is common
there.
"""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.data.examples import AnyExample, Conversation, Preference, Rated
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.schema import Schema

NOTE_NULL_WORD = (
    "a whole text is None, nan, null or the like: a missing value that was exported as a word?"
)
WORDS = frozenset({"None", "nan", "NaN", "NAN", "null", "NULL", "<NA>", "NaT", "undefined"})
_LONGEST = 24  # with white space around it


def noted_nulls(example: AnyExample, record: Record, schema: Schema) -> AnyExample:
    """The example, with a note where a field that is read, or a turn, is such a word."""
    for key, value in record.items():
        if isinstance(value, str) and _is_null(value) and key in schema.reads:
            return _noted(example)
    for part in _parts(example):
        if isinstance(part, Conversation):
            for message in part.messages:
                if _is_null(message.content) and message.role != "tool":
                    return _noted(example)
    return example


def _is_null(text: str) -> bool:
    return len(text) < _LONGEST and text.strip() in WORDS


def _parts(example: AnyExample) -> tuple[AnyExample, ...]:
    if isinstance(example, Preference):
        return example.chosen, example.rejected
    return (example.answer,) if isinstance(example, Rated) else (example,)


def _noted(example: AnyExample) -> AnyExample:
    if isinstance(example, Preference):
        chosen = replace(example.chosen, notes=(*example.chosen.notes, NOTE_NULL_WORD))
        return replace(example, chosen=chosen)
    if isinstance(example, Rated):
        answer = replace(example.answer, notes=(*example.answer.notes, NOTE_NULL_WORD))
        return replace(example, answer=answer)
    return replace(example, notes=(*example.notes, NOTE_NULL_WORD))
