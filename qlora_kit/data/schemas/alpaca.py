"""`alpaca`: an instruction, perhaps with an input, and its output.

    {"instruction": "Translate.", "input": "dog", "output": "Hund",
     "history": [["Hello.", "Hi."]], "system": "…"}

Rules:
- The input follows the instruction behind a blank line; a blank input is none.
- Each pair of the history is a user turn and its answer, before the instruction.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import Unfit, full_text, kind, optional_text, shown
from qlora_kit.data.schemas.schema import CONTEXT_KEYS, MINDED_TOOLS, Rules, Schema
from qlora_kit.data.schemas.tools import TOOL_KEYS, tools_of

PROMPT_KEYS = ("instruction", "input", "history", "system")


def read(record: Record, origin: str, rules: Rules) -> Conversation:
    """One row of this schema."""
    answer = Message("assistant", full_text(record["output"], "output"))
    return Conversation((*prompt(record), answer), origin, tools=tools_of(record))


def prompt(record: Record) -> list[Message]:
    """Everything before the output.

    Raises:
        Unfit: a field is at fault.
    """
    messages = []
    system = optional_text(record, "system")
    if system:
        messages.append(Message("system", system))
    for number, pair in enumerate(_history(record.get("history"))):
        messages += _turns(pair, f"history[{number}]")
    question = full_text(record["instruction"], "instruction")
    given = optional_text(record, "input")
    messages.append(Message("user", f"{question}\n\n{given}" if given else question))
    return messages


SCHEMA = Schema(
    name="alpaca",
    layout="an instruction, perhaps with an input, and its output",
    slots=(("instruction",), ("output",)),
    reads=frozenset({*PROMPT_KEYS, "output", *TOOL_KEYS}),
    read=read,
    minds=(*MINDED_TOOLS, *CONTEXT_KEYS),
)


def _history(given: Any) -> list[Any] | tuple[Any, ...]:
    if given is None or given == "":
        return []
    if not isinstance(given, list | tuple):
        raise Unfit(f"history is {kind(given)}", f"{shown(given)}, not a list of pairs")
    return given


def _turns(pair: Any, where: str) -> list[Message]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        detail = f"{where} is {shown(pair)}, not a question and its answer"
        raise Unfit("history is no list of pairs", detail)
    question, answer = (full_text(text, "a turn of the history", where) for text in pair)
    return [Message("user", question), Message("assistant", answer)]
