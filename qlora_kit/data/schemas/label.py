"""`label`: a text and its class, trained as a question and its answer.

    {"text": "Where is my card?", "category": "card_arrival"}

Rules:
- The text may be called sentence, utterance, review or content; the class label_text, label,
  category, intent or class. `label_text` goes before `label`, whose name it spells.
- A whole number is written in digits, true and false as these words. A fraction is refused, as
  the text of it is a guess.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import Unfit, full_text, is_filled, one_of, shown
from qlora_kit.data.schemas.schema import CONTEXT_KEYS, Rules, Schema

TEXT_KEYS = ("text", "sentence", "utterance", "review", "content")
LABEL_KEYS = ("label", "category", "intent", "class", "label_text")

_LARGEST = 10**18


def read(record: Record, origin: str, rules: Rules) -> Conversation:
    """One row of this schema."""
    text_key = one_of(record, TEXT_KEYS, rules.mapped, "the text")
    named = is_filled(record.get("label_text")) and not rules.mapped.intersection(LABEL_KEYS)
    keys = ("label_text",) if named else LABEL_KEYS
    label_key = one_of(record, keys, rules.mapped, "the label")
    question = Message("user", full_text(record[text_key], "text", text_key))
    answer = Message("assistant", _label(record[label_key], label_key))
    return Conversation((question, answer), origin)


def _label(value: Any, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) < _LARGEST:
        return str(value)
    if isinstance(value, float):
        raise Unfit("label is a fraction", f"{key} is {shown(value)}; write it as text")
    return full_text(value, "label", key)


SCHEMA = Schema(
    name="label",
    layout="a text and its class",
    slots=(TEXT_KEYS, LABEL_KEYS),
    reads=frozenset({*TEXT_KEYS, *LABEL_KEYS}),
    read=read,
    minds=(*CONTEXT_KEYS, "prompt", "question", "query", "input", "instruction"),
)
