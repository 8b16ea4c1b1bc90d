"""From an example to token ids and labels.

Which tokens of a conversation are supervised is found from the outside, for any chat template:
an answer begins where the template, given the messages before it, asks the assistant to speak,
and ends with the special token that closes it. Tokens inside are labelled, all else is context.

Training sees the very tokens that generation sees: what comes before an answer is encoded as
the prompt that asks for it, even where the tokenizer would merge its end into the answer.

An answer that the template writes in another way once more messages follow (reasoning that is
stripped from earlier turns, for one) is context there: the model is never asked to write it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_kit.data.encode import as_generated, encode, encode_after, eos_id, with_bos
from qlora_kit.data.schema import Conversation, Example, PlainText, PromptCompletion
from qlora_kit.data.template import RowRefused, apply_template, spelled_token, turn_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
LossOn = Literal["assistant", "all"]

NOTE_REWRITTEN = "an earlier answer is context only: the chat template rewrites it later on"
NOTE_MERGED = "an earlier answer is context only: its first token begins before it"
NOTE_UNASKED = "what the assistant says first is context only: nothing asks for it"
NOTE_LEFT_OUT = "the chat template leaves out text of a message"


@dataclass(frozen=True)
class TokenSequence:
    """One rendered example.

    `labels[i]` is `input_ids[i]` where token i is supervised, else IGNORE_INDEX. Nothing
    predicts the first token, so it never is. `notes` say what a person should know of the row.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def num_supervised(self) -> int:
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what it should answer."""

    input_ids: tuple[int, ...]
    reference: str
    origin: str


@dataclass(frozen=True)
class _Answer:
    """An assistant turn: the text that asks for it, and where its end token begins."""

    opening: str
    end: int


def render(example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> TokenSequence:
    """Token ids and labels of one example.

    Raises:
        DataError: the tokenizer cannot render such examples at all.
        RowRefused: it can, but not this one.
    """
    if isinstance(example, Conversation):
        return _render_conversation(example, tokenizer, loss_on)
    if isinstance(example, PromptCompletion):
        return _render_completion(example, tokenizer, loss_on)
    ids = _with_eos(tokenizer, with_bos(tokenizer, encode(tokenizer, example.text)))
    spans = [(0, len(ids))] if example.text.strip() else []
    return _sequence(ids, spans, example.origin)


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """The example up to its last answer, for generation; None where nothing asks for one."""
    if isinstance(example, PlainText):
        return None
    if isinstance(example, PromptCompletion):
        ids = with_bos(tokenizer, encode(tokenizer, example.prompt))
        reference = as_generated(tokenizer, example.completion)
        return Prompt(tuple(ids), reference, example.origin) if ids else None
    *asked, answer = example.messages
    if not asked or answer["role"] != "assistant":
        return None
    opening = apply_template(asked, tokenizer, example.origin, prompt=True)
    try:
        text = apply_template(example.messages, tokenizer, example.origin)
        found = _find_answer(example, len(asked), text, tokenizer)
        said = text[len(opening) : found.end] if found else answer["content"]
    except RowRefused:
        said = answer["content"]
    ids = encode(tokenizer, opening)
    return Prompt(tuple(ids), as_generated(tokenizer, said), example.origin)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes an assistant turn, as the template writes it.

    Raises:
        DataError: see `turn_end`.
    """
    return turn_end(tokenizer).id


def _render_completion(
    example: PromptCompletion, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> TokenSequence:
    text = example.prompt + example.completion
    encoded, [prompt] = encode_after(tokenizer, text, [example.prompt], example.origin)
    num_context = len(with_bos(tokenizer, prompt)) if loss_on == "assistant" else 0
    ids = with_bos(tokenizer, encoded.ids)
    ids = _with_eos(tokenizer, ids) if len(ids) > num_context else [*ids, eos_id(tokenizer)]
    return _sequence(ids, [(num_context, len(ids))], example.origin)


def _render_conversation(
    example: Conversation, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> TokenSequence:
    for message in example.messages:
        spelled = spelled_token(message["content"], tokenizer)
        if spelled:
            reason = f"a message spells the special token {spelled}"
            raise RowRefused(example.origin, reason)
    text = apply_template(example.messages, tokenizer, example.origin)
    notes = [NOTE_LEFT_OUT] if _leaves_out(example, text) else []
    if loss_on == "all":
        ids = encode(tokenizer, text)
        return _sequence(ids, [(0, len(ids))], example.origin, notes)
    said = [
        number
        for number, message in enumerate(example.messages)
        if message["role"] == "assistant" and number >= example.num_given
    ]
    if 0 in said:
        notes.append(NOTE_UNASKED)
        said.remove(0)
    if not said:
        return _sequence(encode(tokenizer, text), [], example.origin, notes)
    answers = [_find_answer(example, number, text, tokenizer) for number in said]
    if None in answers:
        notes.append(NOTE_REWRITTEN)
    found = [answer for answer in answers if answer is not None]
    if not found:
        reason = "the chat template rewrites every answer once more messages follow"
        raise RowRefused(example.origin, reason)
    return _label_answers(text, found, tokenizer, example.origin, notes)


def _find_answer(
    example: Conversation, number: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> _Answer | None:
    """Where message `number` stands in the rendered `text`.

    None where it does not stand there as it would if it were the last message.
    """
    opening = apply_template(example.messages[:number], tokenizer, example.origin, prompt=True)
    own = text
    if number + 1 < len(example.messages):
        own = apply_template(example.messages[: number + 1], tokenizer, example.origin)
    if not own.startswith(opening):
        reason = "the chat template's prompt for an answer is not how an answered turn begins"
        raise RowRefused(example.origin, reason)
    end_token = turn_end(tokenizer).text
    end = own.find(end_token, len(opening))
    if end < 0:
        raise RowRefused(example.origin, f"the chat template closes no answer with {end_token}")
    if _squeeze(example.messages[number]["content"]) not in _squeeze(own[len(opening) : end]):
        raise RowRefused(example.origin, "the chat template leaves out part of an answer")
    if not text.startswith(own[: end + len(end_token)]):
        return None
    return _Answer(opening, end)


def _label_answers(
    text: str,
    answers: Sequence[_Answer],
    tokenizer: PreTrainedTokenizerBase,
    origin: str,
    notes: list[str],
) -> TokenSequence:
    """Supervise the answers; the last has its prompt before it, token for token.

    So an earlier one may follow other tokens than its own prompt would end with (two line breaks
    that are one token at the end of a text, and two before a word), but the same text.
    """
    openings = [answer.opening for answer in answers]
    encoded, prompts = encode_after(tokenizer, text, openings, origin)
    end_id = turn_end(tokenizer).id
    spans = []
    for answer, prompt in zip(answers, prompts, strict=True):
        end = encoded.token_at(answer.end)
        if end is None or encoded.ids[end] != end_id:
            raise RowRefused(origin, "the tokenizer does not keep the token that ends an answer")
        is_prefix = encoded.ids[: len(prompt)] == prompt
        start = len(prompt) if is_prefix else encoded.token_from(len(answer.opening))
        if start is None:
            notes.append(NOTE_MERGED)
        else:
            spans.append((start, end + 1))
    return _sequence(encoded.ids, spans, origin, notes)


def _sequence(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    origin: str,
    notes: Sequence[str] = (),
) -> TokenSequence:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[max(start, 1) : end] = ids[max(start, 1) : end]
    return TokenSequence(tuple(ids), tuple(labels), origin, tuple(dict.fromkeys(notes)))


def _leaves_out(example: Conversation, text: str) -> bool:
    """Whether some message is not in the text, or not after the one before; spaces apart."""
    squeezed = _squeeze(text)
    position = 0
    for message in example.messages:
        content = _squeeze(message["content"])
        found = squeezed.find(content, position)
        if found < 0:
            return True
        position = found + len(content)
    return False


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _with_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids that end a sequence: with EOS, once."""
    end_id = eos_id(tokenizer)
    return ids if ids[-1:] == [end_id] else [*ids, end_id]
