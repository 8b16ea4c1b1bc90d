"""Tools and calls of them, in whichever form they are given.

Rules:
- Arguments are an object, or JSON text of one; absent, null and blank text are no arguments.
- A call is `{"type": "function", "function": {"name", "arguments"}}` or `{"name", "arguments"}`.
- `tools` is a list, or JSON text of one; so may each tool be. A bare function,
  `{"name", "description", "parameters"}`, is wrapped as `{"type": "function", "function": …}`.
- A field that is null is absent, as tables write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_kit.data.examples import ToolCall
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import (
    Unfit,
    full_text,
    is_filled,
    json_value,
    kind,
    names,
    parsed,
    shown,
)

TOOL_KEYS = ("tools", "functions")
"""Under which a row lists its tools; the second is the older name."""


def tools_of(record: Record) -> tuple[Mapping[str, Any], ...]:
    """The tools of a row.

    Raises:
        Unfit: they are no list of named functions, or stand under both keys.
    """
    keys = [key for key in TOOL_KEYS if is_filled(record.get(key))]
    if not keys:
        return ()
    if len(keys) > 1:
        raise Unfit("several keys for the tools", " and ".join(keys))
    given = record[keys[0]]
    if isinstance(given, str):
        if not given.strip():
            return ()
        given = parsed(given, "tools", keys[0])
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise Unfit(f"tools is {kind(given)}", f"{keys[0]} must be a list, or JSON text of one")
    return tuple(_tool(one, f"{keys[0]}[{number}]") for number, one in enumerate(given))


def tool_calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    """The calls that an assistant's turn makes.

    Raises:
        Unfit: see `tool_call`.
    """
    if isinstance(given, str):
        given = parsed(given, "tool calls", where)
    if not isinstance(given, list | tuple):
        raise Unfit(f"tool_calls is {kind(given)}", f"{where} must be a list")
    return tuple(tool_call(one, f"{where}[{number}]") for number, one in enumerate(given))


def tool_call(given: Any, where: str) -> ToolCall:
    """One call.

    Raises:
        Unfit: it has no name, or its arguments are no object.
    """
    if not isinstance(given, dict):
        raise Unfit(f"a tool call is {kind(given)}", f"{where} is {shown(given)}")
    other = given.get("type")
    if other not in (None, "function"):
        raise Unfit("a tool call of another type", f"{where}.type is {shown(other)}")
    function = given.get("function")
    function = given if function is None else function
    if not isinstance(function, dict) or function.get("name") is None:
        detail = names(function) if isinstance(function, dict) else shown(function)
        raise Unfit("a tool call without a name", f"{where} has {detail}")
    name = full_text(function["name"], "name of a tool call", f"{where}.name")
    call_id = given.get("id")
    if call_id is not None:
        call_id = full_text(call_id, "id of a tool call", f"{where}.id")
    return ToolCall(name, _arguments(function.get("arguments"), f"{where}.arguments"), call_id)


def calls_in_text(text: str, where: str) -> tuple[ToolCall, ...]:
    """The calls that a `function_call` turn spells as JSON: one, or a list of them.

    Raises:
        Unfit: see `tool_call`.
    """
    given = parsed(text, "tool calls", where)
    if isinstance(given, list):
        if not given:
            raise Unfit("a tool call without a name", f"{where} is an empty list")
        return tuple(tool_call(one, f"{where}[{number}]") for number, one in enumerate(given))
    return (tool_call(given, where),)


def _arguments(given: Any, where: str) -> Mapping[str, Any]:
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    is_text = isinstance(given, str)
    value = parsed(given, "arguments", where) if is_text else json_value(given, "arguments")
    if not isinstance(value, dict):
        raise Unfit("arguments are not an object", f"{where} is {shown(value)}")
    return value


def _tool(given: Any, where: str) -> Mapping[str, Any]:
    value = parsed(given, "tools", where) if isinstance(given, str) else json_value(given, "tools")
    if not isinstance(value, dict):
        raise Unfit(f"a tool is {kind(value)}", f"{where} is {shown(value)}")
    wrapped = value.get("function")
    function = value if wrapped is None else wrapped
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unfit("a tool without a name", f"{where} has {names(value)}")
    full_text(function["name"], "name of a tool", f"{where}.name")
    return {"type": "function", "function": value} if wrapped is None else value
