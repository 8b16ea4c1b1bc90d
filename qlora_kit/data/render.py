"""From an example to token ids and labels.

Which tokens are supervised is found in the rendered text, for any chat template: an assistant
turn begins where the template, given the turns before it, asks the model to speak, and ends
with the special token that closes it. Tokens inside are labelled; everything else is context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from qlora_kit.data.schema import Conversation, Example, PlainText, PromptCompletion
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
LossOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class TokenSequence:
    """One rendered example.

    `labels[i]` is `input_ids[i]` where token i is supervised, else IGNORE_INDEX.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: str

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what it should answer."""

    input_ids: tuple[int, ...]
    reference: str
    origin: str


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> TokenSequence:
    """Token ids and labels of one example.

    Raises:
        DataError: the template is missing, fails, or does not show where a turn ends.
    """
    if isinstance(example, Conversation):
        return _render_conversation(example, tokenizer, loss_on)
    if isinstance(example, PromptCompletion):
        prompt_ids = _encode(tokenizer, example.prompt)
        ids = [*prompt_ids, *_continue(tokenizer, example.completion)]
        num_context = len(prompt_ids) if loss_on == "assistant" else 0
    else:
        ids = [*_encode(tokenizer, example.text), *_end(tokenizer)]
        num_context = 0
    labels = [IGNORE_INDEX] * num_context + ids[num_context:]
    return TokenSequence(tuple(ids), tuple(labels), example.origin)


def render_prompt(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> Prompt | None:
    """The example up to its last answer, for generation; None where nothing is to be answered."""
    if isinstance(example, PlainText):
        return None
    if isinstance(example, PromptCompletion):
        ids = _encode(tokenizer, example.prompt)
        return Prompt(tuple(ids), example.completion.strip(), example.origin)
    if example.messages[-1]["role"] != "assistant":
        return None
    text = _apply_template(
        example.messages[:-1], tokenizer, example.origin, prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(tuple(ids), example.messages[-1]["content"].strip(), example.origin)


def _render_conversation(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> TokenSequence:
    text = _apply_template(example.messages, tokenizer, example.origin)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if loss_on == "all":
        return TokenSequence(tuple(ids), tuple(ids), example.origin)
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in supervised_spans(example, text, tokenizer):
        for position, (first, last) in enumerate(offsets):
            if first >= start and last <= end and last > first:
                labels[position] = ids[position]
    return TokenSequence(tuple(ids), tuple(labels), example.origin)


def supervised_spans(
    example: Conversation, text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Character ranges of `text` that the assistant says, each with its end-of-turn token.

    Raises:
        DataError: the template rewrites earlier turns, or closes a turn with no special token.
    """
    spans = []
    for number, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        opening = _apply_template(
            example.messages[:number], tokenizer, example.origin, prompt=True
        )
        if not text.startswith(opening):
            raise DataError(
                f"{example.origin}: the chat template renders the turns before message {number} "
                "differently once more turns follow, so the assistant's tokens cannot be told "
                "apart. Train on every token with data.loss_on: all, or use another template."
            )
        start = len(opening)
        content = message["content"].strip()
        found = text.find(content, start)
        if found < 0:
            raise DataError(
                f"{example.origin}: the chat template changes the text of message {number}, "
                "so the assistant's tokens cannot be told apart."
            )
        closing = _special_tokens(tokenizer).search(text, found + len(content))
        between = text[found + len(content) : closing.start()] if closing else "-"
        if closing is None or between.strip():
            raise DataError(
                f"{example.origin}: the chat template closes message {number} with no special "
                "token, so the model would never learn to stop. Use another template "
                "(model.chat_template), or add the end token to it."
            )
        spans.append((start, closing.end()))
    return spans


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes an assistant turn, as the template writes it.

    Raises:
        DataError: see `supervised_spans`.
    """
    probe = Conversation(
        (
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi there"},
        ),
        "the chat template's check",
    )
    sequence = _render_conversation(probe, tokenizer, "assistant")
    supervised = [label for label in sequence.labels if label != IGNORE_INDEX]
    if not supervised:
        raise DataError(
            "the chat template's check: no token of the answer is supervised."
        )
    return supervised[-1]


def _apply_template(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    prompt: bool = False,
) -> str:
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
    except TemplateError as error:
        raise DataError(
            f"{origin}: the chat template refuses this conversation: {error}"
        ) from None
    assert isinstance(text, str)
    return text


@lru_cache(maxsize=8)
def _special_token_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(
        "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    named = set(tokenizer.all_special_tokens)
    added = {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    return _special_token_pattern(tuple(sorted(named | added)))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that begins a sequence: with BOS where the model wants one, without an end."""
    ids = list(tokenizer(text)["input_ids"])
    if (
        ids
        and ids[-1] == tokenizer.eos_token_id
        and not text.endswith(tokenizer.eos_token)
    ):
        ids.pop()
    return ids


def _continue(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *_end(tokenizer)]


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so the model would never learn to stop; "
            "take another tokenizer with model.tokenizer_name_or_path."
        )
    return [tokenizer.eos_token_id]
