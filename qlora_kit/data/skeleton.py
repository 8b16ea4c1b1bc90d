"""Marking many conversations of the same roles by one rendering of their template."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.linear import is_linear
from qlora_kit.data.mark import LossOn, Marked, Span, mark_conversation
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import added_tokens, opening_end, spelled_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters, which no text may hold; the spaces show whether the template trims.
_HOLE = re.compile("( ?)\ufdd1(\\d+)\ufdd2( ?)")

# What a conversation's rendering depends on besides its contents.
Shape = tuple[tuple[tuple[str, bool | None], ...], int]


@dataclass(frozen=True, slots=True)
class _Hole:
    """Where the content of a message goes."""

    start: int
    end: int
    keeps_left: bool
    keeps_right: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The rendering of a conversation whose contents are holes."""

    marked: Marked
    holes: tuple[_Hole, ...]
    literals: tuple[str, ...]
    """What stands before each hole, and behind the last."""
    spelled: re.Pattern[str]
    """What no content may hold."""

    def filled(self, conversation: Conversation) -> Marked | None:
        """The rendering of a conversation of this shape; None where it has more than contents.

        Where spans can be found by counting openings they are left as in the skeleton.
        """
        contents = [message.content for message in conversation.messages]
        if self.spelled.search("\n".join(contents)) and any(map(self.spelled.search, contents)):
            return None
        for number, message in enumerate(conversation.messages):
            content, hole = message.content, self.holes[number]
            if not content or content.isspace() or _has_more(message):
                return None
            if not (hole.keeps_left and hole.keeps_right):
                contents[number] = _trimmed(content, hole)
        pieces = [""] * (len(self.literals) + len(contents))
        pieces[::2], pieces[1::2] = self.literals, contents
        marked = self.marked
        spans = marked.spans
        if spans and not marked.openings:
            spans = tuple(
                replace(
                    span,
                    start=self._moved(span.start, contents),
                    end=self._moved(span.end, contents),
                )
                for span in spans
            )
        return Marked(
            "".join(pieces),
            spans,
            conversation.origin,
            is_templated=True,
            notes=marked.notes,
            openings=marked.openings,
        )

    def _moved(self, position: int, contents: list[str]) -> int:
        """Where a position in the skeleton is once its holes are filled.

        Within a hole it stands behind the space on the left, or before that on the right.
        """
        shift = 0
        for hole, content in zip(self.holes, contents, strict=True):
            if position <= hole.start:
                break
            if position == hole.start + 1:
                return hole.start + shift + len(content) - len(content.lstrip())
            if position < hole.end:
                return hole.start + shift + len(content.rstrip())
            shift += len(content) - (hole.end - hole.start)
        return position + shift


def mark_by_skeleton(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Marked | None:
    """As `mark_conversation`; None where this conversation has to be rendered by itself."""
    if conversation.tools:
        return None
    turns = tuple([(message.role, message.train) for message in conversation.messages])
    template = str(tokenizer.chat_template or "")
    skeleton = _skeleton((turns, conversation.num_given), tokenizer, template, loss_on)
    return None if skeleton is None else skeleton.filled(conversation)


def _has_more(message: Message) -> bool:
    return bool(
        message.tool_calls
        or message.reasoning is not None
        or message.name is not None
        or message.tool_call_id is not None
    )


@lru_cache(maxsize=2048)
def _skeleton(
    shape: Shape, tokenizer: PreTrainedTokenizerBase, template: str, loss_on: LossOn
) -> Skeleton | None:
    """None where the template looks into contents, refuses such conversations, or does not write
    each content once.
    """
    if not is_linear(template):
        return None
    turns, num_given = shape
    messages = tuple(
        Message(role, f" \ufdd1{number}\ufdd2 ", train=train)  # type: ignore[arg-type]
        for number, (role, train) in enumerate(turns)
    )
    try:
        marked = mark_conversation(Conversation(messages, "", num_given), tokenizer, loss_on)
    except RowRefused:
        return None
    found = list(_HOLE.finditer(marked.text))
    if [int(one[2]) for one in found] != list(range(len(turns))):
        return None
    holes = tuple(_Hole(one.start(), one.end(), bool(one[1]), bool(one[3])) for one in found)
    edges = [0, *(edge for one in holes for edge in (one.start, one.end)), len(marked.text)]
    literals = tuple(marked.text[edges[n] : edges[n + 1]] for n in range(0, len(edges), 2))
    marked = replace(marked, openings=_openings(marked, tokenizer))
    return Skeleton(marked, holes, literals, spelled_tokens(tokenizer))


def _openings(marked: Marked, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Empty where some span cannot be found by counting, or there is none."""
    opening = opening_end(tokenizer)
    spans = marked.spans or ()
    if not opening or not all(_is_opened(span, opening, marked.text) for span in spans):
        return ()
    first = str(added_tokens(tokenizer).match(opening)[0])  # type: ignore[index]
    return tuple(marked.text.count(first, 0, span.start - len(opening)) for span in spans)


def _is_opened(span: Span, opening: str, text: str) -> bool:
    return span.asked and span.closes and text.endswith(opening, 0, span.start)


def _trimmed(content: str, hole: _Hole) -> str:
    if not hole.keeps_left:
        content = content.lstrip()
    return content if hole.keeps_right else content.rstrip()
