"""What spells a special token in the data, and where it stands in what is rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.data.examples import Conversation, Message, PlainText, PromptCompletion
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import apply_template, control_tokens, spelled_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A noncharacter, which no text may hold and no template looks for.
MARK = "\ufdd0"

NOTE_SPELLED = "a special token spelled in a message was kept as text"
NOTE_KEPT_AS_TEXT = (
    "a special token spelled in plain text was kept as text (data.split_special_tokens: false "
    "makes it the token)"
)
NOTE_MADE_TOKEN = (
    "a special token spelled in plain text became that token (data.split_special_tokens: false)"
)


def spelled_in_plain(
    example: PlainText | PromptCompletion, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Which parts of a text that no template wrote are literal, and what to note of them."""
    texts = (
        (example.text,) if isinstance(example, PlainText) else (example.prompt, example.completion)
    )
    spelled = control_tokens(tokenizer)
    if not any(spelled.search(text) for text in texts):
        return (), ()
    if not example.split_special_tokens:
        return (), (NOTE_MADE_TOKEN,)
    length = sum(map(len, texts))
    return ((0, length),), (NOTE_KEPT_AS_TEXT,)


def spelled_in(
    example: Conversation,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    num_messages: int | None = None,
    prompt: bool = False,
) -> tuple[tuple[int, int], ...]:
    """Where in the rendered `text` special tokens stand that the messages spell.

    The conversation is rendered once more with marks in their place.

    Raises:
        RowRefused: the template treats the two unlike, so it cannot be told.
    """
    spelled = spelled_tokens(tokenizer)
    if any(spelled.search(one) for one in _structured(example)):
        reason = "spells a special token in a tool or a call of one"
        raise RowRefused(example.origin, reason)
    messages = example.messages[:num_messages]
    if not any(spelled.search(one) for message in messages for one in _texts(message)):
        return ()
    found: list[str] = []

    def mark_out(match: re.Match[str]) -> str:
        found.append(match.group())
        return MARK

    marked = replace(
        example,
        messages=tuple(
            replace(
                message,
                content=spelled.sub(mark_out, message.content),
                reasoning=message.reasoning and spelled.sub(mark_out, message.reasoning),
            )
            for message in messages
        ),
    )
    pieces = apply_template(marked, tokenizer, prompt=prompt).split(MARK)
    restored = pieces[0]
    places = []
    for token, piece in zip(found, pieces[1:], strict=False):
        places.append((len(restored), len(restored) + len(token)))
        restored += token + piece
    if restored != text:
        reason = "spells a special token where the chat template rewrites the text"
        raise RowRefused(example.origin, reason)
    return tuple(places)


def _texts(message: Message) -> Sequence[str]:
    if message.reasoning is None:
        return (message.content,)
    return (message.reasoning, message.content)


def _structured(example: Conversation) -> list[str]:
    """What a template writes that is no message's text."""
    return [
        *(str(tool) for tool in example.tools),
        *(str(call) for message in example.messages for call in message.tool_calls),
    ]
