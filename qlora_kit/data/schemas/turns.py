"""Roles, and the order in which they may speak.

Rules:
- A role is read whatever its case, and by its other names: human is user; gpt, bot, model, ai
  and chatgpt are assistant; developer is system; function, ipython, observation and
  tool_response are tool; function_call and tool_call are an assistant turn that is a call.
- The system speaks first, once, or not at all.
- No two turns of one role follow each other, except results of tools.
- A tool speaks only after a turn that calls one, or after another result. A call may also be
  spelled in the text of the turn, as Hermes (`<tool_call>`), Llama 3 (`<|python_tag|>`,
  `<function=`) and Mistral (`[TOOL_CALLS]`) write it; the text is then left as it is.
- The assistant does not begin. In ShareGPT rows, which are often cut out of a longer talk, it
  may when a user turn follows; that greeting is context, as nothing asks for it.
- An answer is the last turn, and a prompt that is given has one behind it. Where everything is
  trained on (`needs_answer` is false), a conversation may end with any turn.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_kit.data.examples import ROLES, Message, Role
from qlora_kit.data.schemas.fields import Unfit, kind, shown

_SPELLED_CALLS = ("<tool_call>", "<function=", "<|python_tag|>", "[TOOL_CALLS]")
_CALL_ROLES = frozenset({"function_call", "tool_call"})

_ROLE_NAMES: dict[str, Role] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", *_CALL_ROLES), "assistant"),
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("function", "ipython", "observation", "tool_response"), "tool"),
}


def role_of(given: Any, where: str) -> tuple[Role, bool]:
    """The role that is meant, and whether its content is the JSON of a call.

    Raises:
        Unfit: there is none of that name.
    """
    if not isinstance(given, str):
        raise Unfit(f"role is {kind(given)}", f"{where} is {shown(given)}")
    name = given.strip().lower()
    role = _ROLE_NAMES.get(name)
    if role is None:
        near = difflib.get_close_matches(name[:40], _ROLE_NAMES, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise Unfit("unknown role", f"{where} is {shown(given)}{meant}")
    return role, name in _CALL_ROLES


def check_order(
    messages: Sequence[Message],
    num_given: int = 0,
    needs_answer: bool = True,
    may_greet: bool = False,
) -> None:
    """See the rules of this module; an answer must be behind the first `num_given` messages.

    Raises:
        Unfit: a turn is not where it may be.
    """
    before: Message | None = None
    answered = False
    for number, message in enumerate(messages):
        role = message.role
        if role == "system":
            if number:
                raise Unfit("a system turn after the start", f"turn {number + 1}")
        elif role == "tool":
            if before is None or not (before.role == "tool" or _calls(before)):
                raise Unfit("a tool result without a call", f"turn {number + 1}")
        elif before is not None and role == before.role:
            raise Unfit(f"two {role} turns in a row", f"turns {number} and {number + 1}")
        elif role == "assistant":
            answered = answered or number >= num_given
            if before is None or before.role == "system":
                answer_to = [one.role for one in messages[number + 1 : number + 2]]
                if not (may_greet and answer_to == ["user"]):
                    raise Unfit("begins with an assistant turn")
        before = message
    if not needs_answer:
        return
    if not answered:
        raise Unfit("no answer", "no assistant turn" + (" after the prompt" if num_given else ""))
    if before is not None and before.role != "assistant":
        raise Unfit(f"ends with a {before.role} turn")


def _calls(message: Message) -> bool:
    if message.tool_calls:
        return True
    return message.role == "assistant" and any(one in message.content for one in _SPELLED_CALLS)


def with_greeting(messages: list[Message]) -> list[Message]:
    """Marks what the assistant says first as context."""
    first = 1 if messages and messages[0].role == "system" else 0
    if len(messages) > first and messages[first].role == "assistant":
        messages[first] = replace(messages[first], train=False)
    return messages


def with_system(messages: list[Message], system: str) -> list[Message]:
    """Puts a system prompt in front that the row holds beside its messages.

    Raises:
        Unfit: the messages have another one.
    """
    if not system:
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content != system:
            raise Unfit("two system prompts", "one beside the messages, and one among them")
        return messages
    return [Message("system", system), *messages]


def last_answer(messages: Sequence[Message]) -> int:
    """The number of messages up to and with the last user turn."""
    asked = [number for number, message in enumerate(messages) if message.role == "user"]
    return asked[-1] + 1 if asked else 0
