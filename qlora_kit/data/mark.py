"""From an example to its text, with what of it is supervised.

Which part of a conversation is supervised is found from the outside, for any chat template: an
answer begins where the template, given the messages before it, asks the assistant to speak, and
ends with the token that closes it. What other roles say is supervised from where it begins to
the token that closes it.

An answer that the template writes in another way once more messages follow (reasoning that is
stripped from earlier turns, for one) is context there: the model is never asked to write it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qlora_kit.data.encode import squeeze
from qlora_kit.data.examples import Conversation, Example, Message, PlainText
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.spelled import MARK, NOTE_SPELLED, spelled_in, spelled_in_plain
from qlora_kit.data.template import (
    added_tokens,
    apply_template,
    require_generation_prompt,
    turn_end,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["assistant", "last", "all"] | tuple[str, ...]

NOTE_REWRITTEN = "an earlier answer is context only: the chat template rewrites it later on"
NOTE_UNASKED = "what the assistant says first is context only: nothing asks for it"
NOTE_LEFT_OUT = "the chat template leaves out text of a message"


@dataclass(frozen=True, slots=True)
class Span:
    """Supervised text: characters from `start` up to `end`, where its closing token begins.

    `asked` says that the text before `start` is what generation is given; `closes` that the token
    at `end` is supervised too.
    """

    start: int
    end: int
    asked: bool
    closes: bool = True


@dataclass(frozen=True, slots=True)
class Marked:
    """An example as text. `spans` are in order; None stands for all of the text."""

    text: str
    spans: tuple[Span, ...] | None
    origin: str
    is_templated: bool
    """Whether a template wrote it, with all its special tokens; else BOS and EOS are added."""
    literal: tuple[tuple[int, int], ...] = ()
    """Parts in which what spells a special token is text."""
    notes: tuple[str, ...] = ()
    openings: tuple[int, ...] = ()
    """For each span the number of openings (see `opening_end`) that stand before its own, where
    spans can be found by counting them; no content holds one."""
    prompt: int = 0
    """Characters that generation is given, where no template wrote the text."""


def mark(example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> Marked:
    """The text of one example, and what of it is trained on.

    Raises:
        DataError: the tokenizer cannot render such examples at all.
        RowRefused: it can, but not this one.
    """
    if isinstance(example, Conversation):
        return mark_conversation(example, tokenizer, loss_on)
    literal, notes = spelled_in_plain(example, tokenizer)
    if isinstance(example, PlainText):
        nothing = () if not example.text.strip() else None
        return Marked(example.text, nothing, example.origin, False, literal, notes)
    text = example.prompt + example.completion
    spans = None if loss_on == "all" else (Span(len(example.prompt), len(text), asked=True),)
    return Marked(text, spans, example.origin, False, literal, notes, prompt=len(example.prompt))


def supervised_turns(conversation: Conversation, loss_on: LossOn) -> tuple[bool, ...]:
    """Whether each message is to be learned: by its role, unless it says so itself."""
    roles = loss_on if isinstance(loss_on, tuple) else ("assistant",)
    chosen = [
        number >= conversation.num_given
        and (message.role in roles if message.train is None else message.train)
        for number, message in enumerate(conversation.messages)
    ]
    if loss_on == "last":
        answers = (n for n, one in enumerate(conversation.messages) if one.role == "assistant")
        last = max(answers, default=-1)
        chosen = [yes and number == last for number, yes in enumerate(chosen)]
    return tuple(chosen)


def mark_conversation(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Marked:
    """As `mark`."""
    text = apply_template(example, tokenizer)
    notes = []
    literal = spelled_in(example, text, tokenizer)
    if literal:
        notes.append(NOTE_SPELLED)
    if _leaves_out(example, text):
        notes.append(NOTE_LEFT_OUT)
    _require_tools(example, text, tokenizer)
    if loss_on == "all" and all(message.train is not False for message in example.messages):
        return Marked(text, None, example.origin, True, literal, tuple(notes))
    spans = []
    for number, is_trained in enumerate(_trained(example, loss_on)):
        if not is_trained:
            continue
        if example.messages[number].role != "assistant":
            spans.append(_find_said(example, number, text, tokenizer))
        elif number == 0:
            notes.append(NOTE_UNASKED)
        else:
            require_generation_prompt(tokenizer)
            answer = find_answer(example, number, text, tokenizer, literal)
            if answer is None:
                notes.append(NOTE_REWRITTEN)
            else:
                spans.append(answer)
    if not spans and NOTE_REWRITTEN in notes:
        reason = "the chat template rewrites every answer once more messages follow"
        raise RowRefused(example.origin, reason)
    return Marked(text, tuple(spans), example.origin, True, literal, tuple(dict.fromkeys(notes)))


def _trained(example: Conversation, loss_on: LossOn) -> tuple[bool, ...]:
    if loss_on == "all":
        return tuple(message.train is not False for message in example.messages)
    return supervised_turns(example, loss_on)


def find_answer(
    example: Conversation,
    number: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    literal: Sequence[tuple[int, int]] = (),
) -> Span | None:
    """Where message `number`, an answer, stands in the rendered `text`.

    `literal` are the places of `text` where messages spell a special token.

    None where it does not stand there as it would if it were the last message.

    Raises:
        RowRefused: it cannot be told what of the text it is.
    """
    opening = apply_template(example, tokenizer, number, prompt=True)
    own = text
    if number + 1 < len(example.messages):
        own = apply_template(example, tokenizer, number + 1)
    if not own.startswith(opening):
        reason = "the chat template's prompt for an answer is not how an answered turn begins"
        raise RowRefused(example.origin, reason)
    message = example.messages[number]
    end_token = turn_end(tokenizer).text
    said = _content_end(message, own, len(opening), example.origin)
    end = own.find(end_token, said)
    while any(start <= end < stop for start, stop in literal):  # it is spelled there
        end = own.find(end_token, end + 1)
    if end < 0:
        raise RowRefused(example.origin, f"the chat template closes no answer with {end_token}")
    if not text.startswith(own[: end + len(end_token)]):
        return None
    return Span(len(opening), end, asked=True)


def _content_end(message: Message, text: str, start: int, origin: str) -> int:
    """Where what a message says ends in the text behind `start`."""
    content = message.content.strip()
    thought = (message.reasoning or "").strip()
    behind = text.find(thought, start) + len(thought) if thought in text[start:] else start
    found = text.find(content, behind)
    if found < 0:
        found = text.find(content, start)
    if found < 0:
        if squeeze(content) not in squeeze(text[start:]):
            raise RowRefused(origin, "the chat template leaves out part of an answer")
        found, content = start, ""  # it wrote the spaces anew; a closing token cannot be inside
    end = found + len(content)
    for call in message.tool_calls:
        named = text.find(call.name, start)
        if named < 0:
            raise RowRefused(origin, "the chat template leaves out tool calls")
        end = max(end, named + len(call.name))
    return end


def _find_said(
    example: Conversation, number: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> Span:
    """Where a message that is no answer stands in the text, up to the token that closes it.

    It is rendered once more with marks around it: its words may be the template's, too.
    """
    message = example.messages[number]
    said = message.content.strip()
    lead = message.content.partition(said)[0] if said else message.content
    trail = message.content[len(lead) + len(said) :]
    marked = replace(message, content=f"{lead}{MARK}{said}{MARK}{trail}")
    messages = (*example.messages[:number], marked)
    pieces = apply_template(replace(example, messages=messages), tokenizer).split(MARK)
    own = apply_template(example, tokenizer, number + 1)
    start, end = len(pieces[0]), len("".join(pieces[:2]))
    if len(pieces) != 3 or "".join(pieces) != own or not text.startswith(own[:end]):
        reason = f"the chat template cannot be split where a {message.role} turn begins"
        raise RowRefused(example.origin, reason)
    closing = added_tokens(tokenizer).search(text, end)
    if closing is None or text[end : closing.start()].strip():
        return Span(start, end, asked=False, closes=False)
    return Span(start, closing.start(), asked=False)


def _require_tools(example: Conversation, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RowRefused where the template does not show what may be called, or what is.

    A name alone proves nothing, for people speak of lamps, too: without them the text must be
    another.
    """
    silent = tuple(replace(message, tool_calls=()) for message in example.messages)
    for reason, without in (
        ("the chat template does not show the tools", replace(example, tools=())),
        ("the chat template leaves out tool calls", replace(example, messages=silent)),
    ):
        if without != example and _renders_to(text, without, tokenizer):
            raise RowRefused(example.origin, reason)
    for tool in example.tools:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            raise RowRefused(example.origin, "the chat template does not show the tools")


def _renders_to(text: str, example: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return apply_template(example, tokenizer) == text
    except RowRefused:
        return False


def _leaves_out(example: Conversation, text: str) -> bool:
    """Whether some message is not in the text, or not after the one before; spaces apart."""
    if any(
        one.reasoning and squeeze(one.reasoning) not in squeeze(text) for one in example.messages
    ):
        return True
    position = 0
    for message in example.messages:
        content = message.content.strip()
        found = text.find(content, position)
        if found < 0:
            return _leaves_out_letters(example, text)
        position = found + len(content)
    return False


def _leaves_out_letters(example: Conversation, text: str) -> bool:
    squeezed = squeeze(text)
    position = 0
    for message in example.messages:
        content = squeeze(message.content)
        found = squeezed.find(content, position)
        if found < 0:
            return True
        position = found + len(content)
    return False
