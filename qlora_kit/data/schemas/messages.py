"""`messages`: roles and contents, as chat templates take them.

    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
     "tools": […], "system": "…"}

Rules:
- Content is text, or a list of text parts, `{"type": "text", "text": …}`, which are joined.
  Images and sounds are refused. Null or absent content is "" beside tool calls, else refused;
  only the result of a tool may be empty.
- `reasoning_content`, `reasoning` or `thinking` of an assistant turn is what it thought.
- `train: true | false` says of a turn whether it is supervised; so do `weight: 0` and
  `weight: 1`, of an assistant's turn.
- `name` and `tool_call_id` are kept where the turn is a tool's.
- The list may be JSON text, as tables have it. A turn may as well be written as ShareGPT
  writes it, with `from` and `value`.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.data.examples import Conversation, Message, Role, ToolCall
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import (
    Unfit,
    full_text,
    is_filled,
    is_sound,
    kind,
    names,
    optional_text,
    parsed,
    shown,
    sound_text,
)
from qlora_kit.data.schemas.schema import MEDIA_KEYS, MINDED_TOOLS, Rules, Schema
from qlora_kit.data.schemas.tools import TOOL_KEYS, calls_in_text, tool_call, tool_calls, tools_of
from qlora_kit.data.schemas.turns import check_order, role_of, with_system

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PLAIN_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def read(record: Record, origin: str, rules: Rules) -> Conversation:
    """One row of this schema."""
    messages = read_messages(record["messages"], "messages")
    messages = with_system(messages, optional_text(record, "system"))
    check_order(messages, needs_answer=rules.needs_answer)
    return Conversation(tuple(messages), origin, tools=tools_of(record))


SCHEMA = Schema(
    name="messages",
    layout="messages of role/content",
    slots=(("messages",),),
    reads=frozenset({"messages", "system", *TOOL_KEYS}),
    read=read,
    minds=(*MINDED_TOOLS, "system_prompt", "system_message", "context"),
)


def read_messages(given: Any, field: str) -> list[Message]:
    """The turns under a key, each by itself; see `check_order` for their order.

    Raises:
        Unfit: it is no list of turns, or one of them is at fault.
    """
    if isinstance(given, str) and given.lstrip().startswith("["):
        given = parsed(given, field, field)
    if not isinstance(given, list | tuple):
        raise Unfit(f"{field} is {kind(given)}", f"{field} is {shown(given)}, not a list of turns")
    if not given:
        raise Unfit(f"{field} is empty")
    messages: list[Message] = []
    for number, turn in enumerate(given):
        # Most turns are a role and a text, and there may be millions.
        if type(turn) is dict and len(turn) == 2:
            role, content = turn.get("role"), turn.get("content")
            if role is None and content is None:
                role, content = turn.get("from"), turn.get("value")
            if (
                type(role) is str
                and role in _PLAIN_ROLES
                and type(content) is str
                and content
                and not content.isspace()
                and (content.isascii() or is_sound(content))
            ):
                messages.append(Message(_PLAIN_ROLES[role], content))
                continue
        _append(messages, *_message(turn, f"{field}[{number}]"))
    return messages


def _append(messages: list[Message], message: Message, is_call: bool) -> None:
    """A function_call turn behind an assistant's belongs to it."""
    before = messages[-1] if messages else None
    if is_call and before is not None and before.role == "assistant":
        calls = before.tool_calls + message.tool_calls
        messages[-1] = Message(
            "assistant",
            before.content,
            calls,
            before.reasoning or message.reasoning,
            train=before.train if message.train is None else message.train,
        )
    else:
        messages.append(message)


def _message(turn: Any, where: str) -> tuple[Message, bool]:
    """A turn, and whether it is a function_call turn, whose content is the call."""
    if not isinstance(turn, dict):
        raise Unfit(f"a turn is {kind(turn)}", f"{where} is {shown(turn)}, not an object")
    role_key = "role" if turn.get("role") is not None else "from"
    if turn.get(role_key) is None:
        raise Unfit("a turn without a role", f"{where} has {names(turn)}")
    for key in MEDIA_KEYS:
        if is_filled(turn.get(key)):
            raise Unfit(f"{key} in a turn", f"{where} has {names(turn)}")
    role, is_call = role_of(turn[role_key], f"{where}.{role_key}")
    calls = _calls(turn, where)
    if calls and role != "assistant":
        raise Unfit(f"tool calls of a {role} turn", where)
    key = "content" if turn.get("content") is not None or "value" not in turn else "value"
    content = _content(turn, key, bool(calls), f"{where}.{key}")
    if is_call:
        calls, content = calls + calls_in_text(content, f"{where}.{key}"), ""
    if role != "tool" and not calls and (not content or content.isspace()):
        raise Unfit("an empty turn", f"{where}, of the {role}")
    message = Message(
        role,
        content,
        calls,
        _reasoning(turn, role, where),
        train=_train(turn, role, where),
        **(_result_of(turn, where) if role == "tool" else {}),
    )
    return message, is_call


def _content(turn: Record, key: str, has_calls: bool, where: str) -> str:
    value = turn.get(key)
    if isinstance(value, list | tuple):
        return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(value))
    if value is None and has_calls:
        return ""
    if key not in turn:
        raise Unfit("a turn without content", f"{where.rpartition('.')[0]} has {names(turn)}")
    return sound_text(value, "content", where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise Unfit(f"a content part is {kind(part)}", f"{where} is {shown(part)}")
    given = part.get("type")
    if given != "text":
        name = given if isinstance(given, str) and given.isidentifier() else kind(given)
        raise Unfit(f"a content part of type {name[:30]}", f"{where} has {names(part)}")
    return sound_text(part.get("text"), "text of a content part", f"{where}.text")


def _calls(turn: Record, where: str) -> tuple[ToolCall, ...]:
    calls: tuple[ToolCall, ...] = ()
    if is_filled(turn.get("tool_calls")):
        calls = tool_calls(turn["tool_calls"], f"{where}.tool_calls")
    if is_filled(turn.get("function_call")):
        if calls:
            raise Unfit("tool_calls and function_call in one turn", where)
        calls = (tool_call(turn["function_call"], f"{where}.function_call"),)
    return calls


def _reasoning(turn: Record, role: str, where: str) -> str | None:
    given = {key: optional_text(turn, key) for key in REASONING_KEYS if key in turn}
    texts = {text for text in given.values() if text}
    if len(texts) > 1:
        raise Unfit("two kinds of reasoning", f"{where} has {names(given)}")
    if texts and role != "assistant":
        raise Unfit(f"reasoning of a {role} turn", where)
    return texts.pop() if texts else None


def _train(turn: Record, role: str, where: str) -> bool | None:
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise Unfit(
            f"train is {kind(train)}", f"{where}.train is {shown(train)}, not true or false"
        )
    if weight is None:
        return train
    if isinstance(weight, bool) or weight not in (0, 1):
        detail = f"{where}.weight is {shown(weight)}"
        raise Unfit("weight is neither 0 nor 1", detail)
    if role != "assistant":
        return train
    if train is not None and train != bool(weight):
        raise Unfit("train and weight disagree", where)
    return bool(weight)


def _result_of(turn: Record, where: str) -> dict[str, str]:
    """Which tool's result this is."""
    keys = [key for key in ("name", "tool_call_id") if is_filled(turn.get(key))]
    return {key: full_text(turn[key], f"{key} of a tool result", f"{where}.{key}") for key in keys}
