"""What a chat template writes around the turns of a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

PROBE_ORIGIN = "the chat template's check"
PROBE = (
    {"role": "user", "content": "How are you today?"},
    {"role": "assistant", "content": "Very well, thank you."},
)


class RowRefused(DataError):
    """One row that cannot be trained on as it stands; `reason` is what rows like it share."""

    def __init__(self, origin: str, reason: str):
        self.reason = reason
        super().__init__(f"{origin}: {reason}.")


@dataclass(frozen=True)
class TurnEnd:
    """The token that closes an assistant turn."""

    text: str
    id: int


def apply_template(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    prompt: bool = False,
) -> str:
    """The conversation as text; with `prompt`, up to where the assistant is to speak.

    Raises:
        DataError: there is no template.
        RowRefused: the template fails on these messages.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{origin} holds a conversation, but the tokenizer has no chat template. Name a "
            "Jinja file with model.chat_template, take an instruct model, or give rows as "
            "prompt and completion."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise RowRefused(origin, f"the chat template refuses it: {reason}") from None
    assert isinstance(text, str)
    return text


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The token with which the template closes what the assistant says.

    It is one that no text is split into: a special token, or (as some models have it) one that
    was added to the vocabulary and not declared special.

    Raises:
        DataError: there is no template, it leaves the answer out, or closes it with no such
            token.
    """
    return _find_turn_end(tokenizer, str(tokenizer.chat_template or ""))


def spelled_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first token in a text that only a template may write: special, or the end of a turn."""
    found = _special_tokens(tokenizer, len(tokenizer)).search(text)
    end = turn_end(tokenizer).text
    return found.group() if found else end if end in text else None


# A tokenizer is not changed once it is loaded, its template apart.
@lru_cache(maxsize=8)
def _find_turn_end(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnEnd:
    text = apply_template(PROBE, tokenizer, PROBE_ORIGIN)
    answer = PROBE[-1]["content"]
    found = text.rfind(answer)
    if found < 0:
        raise DataError(
            f"{PROBE_ORIGIN}: the template leaves out what the assistant says, so there is "
            "nothing to train on. Use another template (model.chat_template)."
        )
    after = found + len(answer)
    closing = _compile(str(token) for token in _added(tokenizer)).search(text, after)
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
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str]:
    special = {str(token) for token in _added(tokenizer) if token.special}
    return _compile({*tokenizer.all_special_tokens, *special})


def _added(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """What text is cut at before it is split; some vocabularies add runs of spaces, too."""
    return [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]


def _compile(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, longest first."""
    longest_first = sorted(set(tokens) - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
