"""`sharegpt`: turns of `from` and `value`.

    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
     "system": "…", "tools": "[…]"}

Rules, beside those of `messages`:
- The key may be `conversation`, and a turn may be written with `role` and `content`.
- The value of a function_call turn is JSON: `{"name", "arguments"}`, or a list of these. It
  belongs to the assistant's turn before it, where there is one.
- The assistant may speak first when a user turn follows; what it says there is context.
"""

from __future__ import annotations

from qlora_kit.data.examples import Conversation
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import one_of, optional_text
from qlora_kit.data.schemas.messages import read_messages
from qlora_kit.data.schemas.schema import MINDED_TOOLS, Rules, Schema
from qlora_kit.data.schemas.tools import TOOL_KEYS, tools_of
from qlora_kit.data.schemas.turns import check_order, with_greeting, with_system

KEYS = ("conversations", "conversation")


def read(record: Record, origin: str, rules: Rules) -> Conversation:
    """One row of this schema."""
    key = one_of(record, KEYS, rules.mapped, "the conversation")
    messages = with_system(read_messages(record[key], key), optional_text(record, "system"))
    check_order(messages, needs_answer=rules.needs_answer, may_greet=True)
    return Conversation(tuple(with_greeting(messages)), origin, tools=tools_of(record))


SCHEMA = Schema(
    name="sharegpt",
    layout="conversations of from/value",
    slots=(KEYS,),
    reads=frozenset({*KEYS, "system", *TOOL_KEYS}),
    read=read,
    minds=(*MINDED_TOOLS, "system_prompt", "system_message", "context"),
)
