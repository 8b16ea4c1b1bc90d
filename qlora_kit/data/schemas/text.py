"""`text`: plain text, of which every token is trained on.

    {"text": "Once upon a time …"}

The key may be `content`.
"""

from __future__ import annotations

from qlora_kit.data.examples import PlainText
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import full_text, one_of
from qlora_kit.data.schemas.schema import Rules, Schema

KEYS = ("text", "content")


def read(record: Record, origin: str, rules: Rules) -> PlainText:
    """One row of this schema."""
    key = one_of(record, KEYS, rules.mapped, "the text")
    text = full_text(record[key], "text", key)
    return PlainText(text, origin, rules.split_special_tokens)


SCHEMA = Schema(
    name="text",
    layout="plain text",
    slots=(KEYS,),
    reads=frozenset(KEYS),
    read=read,
    minds=("role", "from", "parent_id"),
)
