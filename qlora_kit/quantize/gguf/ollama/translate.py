"""The chat template that was trained, in the language of Ollama's templates.

The two languages differ too much to translate one into the other word by word. What the trained
template writes around the turns is found by rendering a few conversations with it; a template of
Ollama's is made of that, and is only good if it renders every other conversation alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import apply_template
from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.ollama.go_template import quoted, render
from qlora_kit.quantize.gguf.probes import conversations, tool_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER, _ANSWER, _THIRD, _FOURTH, _SYSTEM = (
    "Alpha asks.",
    "Beta answers.",
    "Gamma asks.",
    "Delta answers.",
    "Epsilon rules.",
)


@dataclass(frozen=True)
class Translated:
    """A template of Ollama's that says what the trained one says, and what it cannot say."""

    template: str
    notes: tuple[str, ...]
    num_compared: int


@dataclass(frozen=True)
class _Shape:
    """What a template writes around turns."""

    head: str
    """Before the first turn where there is no system message; a default one may stand here."""
    before_user: str
    after_user: str
    before_answer: str
    after_answer: str
    opening: str
    """After the user's last turn, where the assistant is to speak."""
    system: tuple[str, str] | None
    """Around a system message that stands before the first turn; None where it stands inside of
    it, or is refused."""
    system_inside: tuple[str, str] | None
    """Around a system message that stands inside the first user turn, before its text."""


def to_ollama(tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> Translated:
    """Make it, and compare it with the trained one.

    Args:
        adds_bos: whether the GGUF file asks for the begin token to be added; then the template
            must not write it.

    Raises:
        ModelError: Ollama's language cannot say what the template says; shows where.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template, so an Ollama Modelfile would have none; name the "
            "one that the model was trained with (model.chat_template)."
        )
    shape = _learn(tokenizer)
    begin = str(tokenizer.bos_token or "") if adds_bos else ""
    template = _write(shape, begin)
    trims = _compare(template, tokenizer, begin)
    notes = []
    if trims:
        notes.append(
            "the trained template takes away blanks around a message, which Ollama's cannot: a "
            "message that begins or ends with blanks is read otherwise"
        )
    if _has_tools(tokenizer):
        notes.append(
            "tools are left out: the trained template writes their JSON with blanks that Ollama "
            "does not write, so a model would read them otherwise than it was trained"
        )
    return Translated(template, tuple(notes), len(_open_conversations(tokenizer)))


def render_ollama(template: str, conversation: Conversation) -> str:
    """As Ollama would: system messages are also given on their own, joined by an empty line."""
    messages = [{"Role": one.role, "Content": one.content} for one in conversation.messages]
    system = "\n\n".join(one.content for one in conversation.messages if one.role == "system")
    return render(template, {"System": system, "Messages": messages, "Tools": []})


def _learn(tokenizer: PreTrainedTokenizerBase) -> _Shape:
    user, answer = Message("user", _USER), Message("assistant", _ANSWER)
    third, fourth = Message("user", _THIRD), Message("assistant", _FOURTH)
    whole = _text(tokenizer, user, answer, third, fourth)
    asked = _text(tokenizer, user, prompt=True)
    plain = _text(tokenizer, user)
    if whole is None or asked is None or plain is None:
        raise ModelError(
            "the chat template refuses a plain conversation, so it cannot be written for Ollama."
        )
    start, after_first, after_answer, between, end = _cut(whole, _USER, _ANSWER, _THIRD, _FOURTH)
    after_user = plain.partition(_USER)[2]
    opening = asked.partition(_USER)[2].removeprefix(after_user)
    del between
    closing = end
    before_user = after_answer.removeprefix(closing)
    shape_known = (
        after_first.startswith(after_user)
        and after_answer.startswith(closing)
        and start.endswith(before_user)
        and asked.startswith(plain.rstrip("\n"))
    )
    if not shape_known:
        raise ModelError(_NO_SHAPE)
    head = start[: len(start) - len(before_user)]
    own, inside = _learn_system(tokenizer, before_user, head)
    return _Shape(
        head=head,
        before_user=before_user,
        after_user=after_user,
        before_answer=after_first.removeprefix(after_user),
        after_answer=closing,
        opening=opening,
        system=own,
        system_inside=inside,
    )


_NO_SHAPE = (
    "what the chat template writes around a turn depends on more than whose turn it is, so it "
    "cannot be written for Ollama."
)


def _learn_system(
    tokenizer: PreTrainedTokenizerBase, before_user: str, head: str
) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    text = _text(tokenizer, Message("system", _SYSTEM), Message("user", _USER))
    if text is None or _SYSTEM not in text:
        return None, None
    before, between, _ = _cut(text, _SYSTEM, _USER)
    if between.endswith(before_user) and before_user:
        return (before, between[: len(between) - len(before_user)]), None
    if before.endswith(before_user):
        return None, (before[len(head + before_user) :], between)
    raise ModelError(_NO_SHAPE)


def _cut(text: str, *marks: str) -> list[str]:
    """The stretches between marks that stand in the text in this order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ModelError(_NO_SHAPE)
        parts.append(part)
    return [*parts, text]


def _write(shape: _Shape, begin: str) -> str:
    """Texts are written as strings, so that no blank of theirs is taken away."""

    def text(value: str) -> str:
        return "{{ " + quoted(value) + " }}" if value else ""

    head = shape.head.removeprefix(begin)
    lines = ["{{- $system := .System }}"]
    if shape.system is not None:
        before, after = shape.system[0].removeprefix(begin), shape.system[1]
        lines.append(
            "{{- if .System }}"
            + text(before)
            + "{{ .System }}"
            + text(after)
            + ("{{ else }}" + text(head) if head else "")
            + "{{ end }}"
        )
    elif head:
        lines.append(text(head))
    inside = ""
    if shape.system_inside is not None:
        before, after = shape.system_inside
        inside = "{{ if $system }}" + text(before) + "{{ $system }}" + text(after)
        inside += '{{ $system = "" }}{{ end }}'
    lines += [
        "{{- range $i, $message := .Messages }}",
        "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
        '{{- if eq .Role "user" }}'
        + text(shape.before_user)
        + inside
        + "{{ .Content }}"
        + text(shape.after_user)
        + ("{{ if $last }}" + text(shape.opening) + "{{ end }}" if shape.opening else ""),
        '{{- else if eq .Role "assistant" }}'
        + text(shape.before_answer)
        + "{{ .Content }}"
        + ("{{ if not $last }}" + text(shape.after_answer) + "{{ end }}"),
        "{{- end }}",
        "{{- end }}",
    ]
    return "\n".join(lines)


def _compare(template: str, tokenizer: PreTrainedTokenizerBase, begin: str) -> bool:
    """Whether the trained template takes blanks away; ModelError where anything else differs."""
    trims = False
    for conversation in _open_conversations(tokenizer):
        expected = _conversation_text(tokenizer, conversation)
        if expected is None:
            continue
        got = begin + render_ollama(template, conversation)
        if got == expected:
            continue
        stripped = _stripped(conversation)
        if stripped != conversation and (begin + render_ollama(template, stripped) == expected):
            trims = True
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
            min(len(expected), len(got)),
        )
        raise ModelError(
            "the chat template cannot be written for Ollama: of "
            f"{conversation.origin} it makes …{expected[max(0, at - 30) : at + 50]!r}, and Ollama "
            f"would make …{got[max(0, at - 30) : at + 50]!r}."
        )
    return trims


def _open_conversations(tokenizer: PreTrainedTokenizerBase) -> list[Conversation]:
    """Those that an answer is asked for, without tools."""
    asked = []
    for one in conversations(tokenizer):
        messages = one.messages
        while messages and messages[-1].role != "user":
            messages = messages[:-1]
        if messages and not one.tools:
            asked.append(Conversation(messages, one.origin))
    return asked


def _has_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    asked = tool_conversations()[0]
    without = Conversation(asked.messages, asked.origin)
    return _conversation_text(tokenizer, asked) != _conversation_text(tokenizer, without)


def _stripped(conversation: Conversation) -> Conversation:
    messages = tuple(Message(one.role, one.content.strip()) for one in conversation.messages)
    return Conversation(messages, conversation.origin)


def _text(
    tokenizer: PreTrainedTokenizerBase, *messages: Message, prompt: bool = False
) -> str | None:
    return _conversation_text(tokenizer, Conversation(messages, "a probe"), prompt)


def _conversation_text(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, prompt: bool = True
) -> str | None:
    try:
        return apply_template(conversation, tokenizer, prompt=prompt)
    except RowRefused:
        return None


def ends_of(tokenizer: PreTrainedTokenizerBase, others: Sequence[str] = ()) -> tuple[str, ...]:
    """Texts that end an answer: the template's own end, the tokenizer's, and others."""
    from qlora_kit.data.template import turn_end

    named = [turn_end(tokenizer).text, str(tokenizer.eos_token or ""), *others]
    return tuple(dict.fromkeys(one for one in named if one))
