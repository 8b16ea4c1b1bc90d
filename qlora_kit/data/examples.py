"""What a row means, whatever schema it came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant makes; `arguments` is the object, however it was given."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """In the form that chat templates expect."""
        call: dict[str, Any] = {
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return call if self.id is None else {"id": self.id, **call}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant's may have tool calls instead of, or beside, its content.

    `train` says whether its tokens are supervised; None leaves that to the recipe.
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    """What the assistant thought before it answered."""
    name: str | None = None
    """Of the tool whose result this is."""
    tool_call_id: str | None = None
    train: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """In the form that chat templates expect; fields that are not set are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        optional = {
            "reasoning_content": self.reasoning,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        message.update({key: value for key, value in optional.items() if value is not None})
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, rendered by the chat template.

    The first `num_given` messages are a prompt: no answer among them is trained on.
    """

    messages: tuple[Message, ...]
    origin: str
    num_given: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a person should know of the row."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Text and how it goes on, joined as they stand, without a chat template."""

    prompt: str
    completion: str
    origin: str
    split_special_tokens: bool = True
    """Whether a special token spelled in either is text; else it is that token."""
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text of which every token is trained on."""

    text: str
    origin: str
    split_special_tokens: bool = True
    """As for a prompt and its completion."""
    notes: tuple[str, ...] = field(default=(), compare=False)


Example = Conversation | PromptCompletion | PlainText


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to the same prompt; fine-tuning trains on the chosen one."""

    chosen: Conversation | PromptCompletion
    rejected: Conversation | PromptCompletion
    origin: str


@dataclass(frozen=True, slots=True)
class Rated:
    """An answer and whether it is wanted; fine-tuning trains on those that are."""

    answer: Conversation | PromptCompletion
    wanted: bool
    origin: str


AnyExample = Example | Preference | Rated
