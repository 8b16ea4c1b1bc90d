"""What a chat template writes around the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.rows import RowRefused
from qlora_kit.errors import DataError
from qlora_kit.templates import library

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

PROBE_ORIGIN = "the chat template's check"
PROBE = Conversation(
    (
        Message("user", "How are you today?"),
        Message("assistant", "Very well, thank you."),
    ),
    PROBE_ORIGIN,
)


@dataclass(frozen=True)
class TurnEnd:
    """The token that closes an assistant turn."""

    text: str
    id: int


def apply_template(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    num_messages: int | None = None,
    prompt: bool = False,
) -> str:
    """The conversation, or its first messages, as text; with `prompt`, up to where the assistant
    is to speak.

    Raises:
        DataError: there is no template.
        RowRefused: the template fails on these messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{conversation.origin} holds a conversation, but the tokenizer has no chat template. "
            "Name one with model.chat_template (a Jinja file, or one that comes with the kit: "
            f"{', '.join(library())}), take an instruct model, or give rows as prompt and "
            "completion."
        )
    messages = conversation.messages[:num_messages]
    try:
        text = tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tools=[_tool(one) for one in conversation.tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise RowRefused(conversation.origin, f"the chat template refuses it: {reason}") from None
    assert isinstance(text, str)
    return text


def _tool(schema: Mapping[str, Any]) -> dict[str, Any]:
    """As templates expect it; many files hold only the function."""
    if isinstance(schema.get("function"), Mapping):
        return dict(schema)
    return {"type": "function", "function": dict(schema)}


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The token with which the template closes what the assistant says.

    It is one that no text is split into: a special token, or (as some models have it) one that
    was added to the vocabulary and not declared special.

    Raises:
        DataError: there is no template, it leaves the answer out, or closes it with no such
            token.
    """
    return _find_turn_end(tokenizer, str(tokenizer.chat_template or ""))


def require_generation_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError where the template begins an answer with a header that no prompt has.

    The model would have to learn to write it, and generation would have to do without. A template
    that writes nothing before an answer, as Mistral's, needs no prompt for it.
    """
    header = _header_without_prompt(tokenizer, str(tokenizer.chat_template or ""))
    if header:
        raise DataError(
            f"{PROBE_ORIGIN}: the template begins an answer with {header[:40]!r}, but does not "
            "write that when it is asked for a generation prompt. Add {% if add_generation_prompt "
            "%}{{ " + repr(header[:40]) + " }}{% endif %} to its end, or use another template "
            "(model.chat_template)."
        )


@lru_cache(maxsize=8)
def _header_without_prompt(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What stands between the prompt for an answer and it, where the prompt asks for none."""
    try:
        asked = apply_template(PROBE, tokenizer, 1)
        prompt = apply_template(PROBE, tokenizer, 1, prompt=True)
        text = apply_template(PROBE, tokenizer)
    except RowRefused:
        return ""
    if prompt != asked or not text.startswith(prompt):
        return ""
    header = text[len(prompt) :].partition(PROBE.messages[-1].content)[0]
    return header if header.strip() else ""


def opening_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """How prompts for an answer mostly end, from an added token on; empty where they have none."""
    return _opening_end(tokenizer, str(tokenizer.chat_template or ""))


@lru_cache(maxsize=8)
def _opening_end(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    try:
        opening = apply_template(PROBE, tokenizer, 1, prompt=True)
    except RowRefused:
        return ""
    cuts = [found.start() for found in added_tokens(tokenizer).finditer(opening)]
    return opening[cuts[-1] :] if cuts else ""


def spelled_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what only a template may write: a special token, or the end of a turn."""
    return _special_tokens(tokenizer, len(tokenizer), str(tokenizer.chat_template or ""))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """As `spelled_tokens`, of a tokenizer that may have no template, or a faulty one."""
    return _control_tokens(tokenizer, len(tokenizer), str(tokenizer.chat_template or ""))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches each token that text is cut at before it is split."""
    return _added_tokens(tokenizer, len(tokenizer))


# A tokenizer is not changed once it is loaded, its template apart.
@lru_cache(maxsize=8)
def _find_turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnEnd:
    text = apply_template(PROBE, tokenizer)
    answer = PROBE.messages[-1].content
    found = text.rfind(answer)
    if found < 0:
        raise DataError(
            f"{PROBE_ORIGIN}: the template leaves out what the assistant says, so there is "
            "nothing to train on. Use another template (model.chat_template)."
        )
    after = found + len(answer)
    closing = _added_tokens(tokenizer, len(tokenizer)).search(text, after)
    if closing is None or text[after : closing.start()].strip():
        raise DataError(
            f"{PROBE_ORIGIN}: the template closes an answer with "
            f"{text[after : after + 20]!r}, which is no special token, so the model would never "
            "learn to stop. Use another template (model.chat_template), or add the end token "
            "to it."
        )
    token_id = tokenizer.convert_tokens_to_ids(closing.group())
    assert isinstance(token_id, int)
    return TurnEnd(closing.group(), token_id)


@lru_cache(maxsize=8)
def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, template: str
) -> re.Pattern[str]:
    special = {str(token) for token in _added(tokenizer) if token.special}
    end = {_find_turn_end(tokenizer, template).text} if template else set()
    return _compile({*tokenizer.all_special_tokens, *special, *end})


@lru_cache(maxsize=8)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, size: int, template: str
) -> re.Pattern[str]:
    try:
        return _special_tokens(tokenizer, size, template)
    except DataError:
        return _special_tokens(tokenizer, size, "")


@lru_cache(maxsize=8)
def _added_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    return _compile({str(token) for token in _added(tokenizer)})


def _added(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """What text is cut at before it is split; some vocabularies add runs of spaces, too."""
    return [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]


def _compile(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longest first."""
    longest_first = sorted(set(tokens) - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
