"""From an example to token ids and labels.

Training sees the very tokens that generation sees: what comes before an answer is encoded as
the prompt that asks for it, even where the tokenizer would merge its end into the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.counted import Turn, count_answers
from qlora_kit.data.encode import (
    Encoded,
    Piece,
    as_generated,
    encode,
    encode_batch,
    encode_cut,
    encode_ids,
    encode_literally,
    eos_id,
    with_bos,
)
from qlora_kit.data.examples import Conversation, Example, PlainText, PromptCompletion
from qlora_kit.data.mark import LossOn, Marked, find_answer, mark
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX, Block, Rendered, TokenSequence
from qlora_kit.data.skeleton import mark_by_skeleton
from qlora_kit.data.spelled import spelled_in
from qlora_kit.data.template import added_tokens, apply_template, opening_end, turn_end

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# A tokenizer takes about 280 bytes for a character, and a row is encoded in one go.
MOST_CHARACTERS = 8_000_000
ENORMOUS = f"a text of more than {MOST_CHARACTERS:,} characters"
NOTE_MERGED = "an earlier answer is context only: its first token begins before it"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given, and what it should answer."""

    input_ids: tuple[int, ...]
    reference: str
    origin: str


def render(example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn) -> TokenSequence:
    """Token ids and labels of one example.

    Raises:
        DataError: the tokenizer cannot render such examples at all.
        RowRefused: it can, but not this one.
    """
    rendering = Rendering([example], tokenizer, loss_on)
    rendering.encode()
    [rendered] = rendering.label()
    if isinstance(rendered, RowRefused):
        raise rendered
    return rendered


class Rendering:
    """Examples on their way to sequences: marked, then encoded all at once, then labelled.

    The middle step is the tokenizer's own, on all cores and without Python's lock, so that
    another thread can go on meanwhile.

    Raises:
        DataError: the tokenizer cannot render such examples at all.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
    ):
        self._tokenizer = tokenizer
        self._marked = [_mark(example, tokenizer, loss_on) for example in examples]
        self._examples = examples
        self._loss_on = loss_on
        self._ids: list[list[int]] = []
        self._encodings: list[Encoding] = []

    def encode(self) -> None:
        marked = [one for one in self._marked if isinstance(one, Marked)]
        counted = [one.text for one in marked if one.openings]
        whole = [one.text for one in marked if not one.openings and not one.literal]
        self._ids = encode_ids(self._tokenizer, counted) if counted else []
        self._encodings = encode_batch(self._tokenizer, whole) if whole else []

    def label(self) -> Rendered:
        """Each example rendered, or why it cannot be."""
        marked = [one for one in self._marked if isinstance(one, Marked) and one.openings]
        block, are_found = _count_answers(marked, self._ids, self._tokenizer)
        if len(marked) == len(self._marked) and are_found.all():
            return Rendered(block, {})
        return self._joined(block, iter(are_found.tolist()))

    def _joined(self, counted: Block, are_found: Iterator[bool]) -> Rendered:
        """The rows of a block, and the others between them."""
        encodings = iter(self._encodings)
        pieces, refused, num_counted = [], {}, 0
        for number, (example, marked) in enumerate(zip(self._examples, self._marked, strict=True)):
            if isinstance(marked, Marked) and marked.openings:
                num_counted += 1
                if next(are_found):
                    pieces.append(counted.run(num_counted - 1, num_counted))
                    continue
            rendered = self._labelled(example, marked, encodings)
            if isinstance(rendered, RowRefused):
                refused[number] = rendered
                rendered = TokenSequence((), (), example.origin)
            pieces.append(Block.of([rendered]))
        return Rendered(Block.joined(pieces), refused)

    def _labelled(
        self, example: Example, marked: Marked | RowRefused, encodings: Iterator[Encoding]
    ) -> TokenSequence | RowRefused:
        if isinstance(marked, RowRefused):
            return marked
        try:
            if marked.openings:
                marked = mark(example, self._tokenizer, self._loss_on)
                encoding = encode_batch(self._tokenizer, [marked.text])[0]
                return _label(marked, Encoded.of([Piece(marked.text, encoding)]), self._tokenizer)
            if marked.literal:
                encoded = encode_literally(
                    self._tokenizer, marked.text, marked.literal, marked.origin
                )
            else:
                encoded = Encoded.of([Piece(marked.text, next(encodings))])
            return _label(marked, encoded, self._tokenizer)
        except RowRefused as refused:
            return refused


def _mark(
    example: Example, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Marked | RowRefused:
    try:
        marked = None
        if isinstance(example, Conversation):
            marked = mark_by_skeleton(example, tokenizer, loss_on)
        marked = marked or mark(example, tokenizer, loss_on)
        if len(marked.text) > MOST_CHARACTERS:
            detail = f"{len(marked.text):,} characters; divide it (text_rows: paragraph, or line)"
            raise RowRefused(example.origin, ENORMOUS, detail)
        return marked
    except RowRefused as refused:
        return refused


def _label(marked: Marked, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> TokenSequence:
    if marked.is_templated:
        return _label_turns(marked, encoded, tokenizer)
    return _label_plain(marked, encoded, tokenizer)


def _count_answers(
    marked: Sequence[Marked], ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Block, np.ndarray]:
    """As `count_answers`."""
    if not marked:
        return Block.of([]), np.empty(0, np.bool_)
    turn = Turn(_ids_of(tokenizer, opening_end(tokenizer)), turn_end(tokenizer).id)
    return count_answers(marked, ids, turn)


def _label_plain(
    marked: Marked, encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> TokenSequence:
    """Text that no template wrote: BOS before it where the tokenizer puts one, EOS behind it."""
    end_id = eos_id(tokenizer)
    opening = marked.text[: marked.prompt]
    prompt = _ids_as_text(tokenizer, opening, marked)
    if encoded.ids[: len(prompt)] != prompt:
        encoded = encode_cut(tokenizer, encoded, opening, marked.origin, marked.literal)
    num_prompt = len(with_bos(tokenizer, prompt)) if marked.spans else 0
    ids = with_bos(tokenizer, encoded.ids)
    if ids[-1:] != [end_id] or len(ids) <= num_prompt:
        ids = [*ids, end_id]
    spans = [(num_prompt, len(ids))] if marked.spans != () else []
    return _sequence(ids, spans, marked)


def _ids_as_text(tokenizer: PreTrainedTokenizerBase, opening: str, marked: Marked) -> list[int]:
    """The beginning of a text, encoded by itself; what is literal there, too."""
    literal = [
        (start, min(end, len(opening))) for start, end in marked.literal if start < len(opening)
    ]
    if literal:
        return encode_literally(tokenizer, opening, literal, marked.origin).ids
    return encode(tokenizer, opening) if opening else []


def _label_turns(
    marked: Marked, encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> TokenSequence:
    """Supervise the turns; the last answer has its prompt before it, token for token.

    So an earlier one may follow other tokens than its own prompt would end with (two line breaks
    that are one token at the end of a text, and two before a word), but the same text.
    """
    if marked.spans is None:
        return _sequence(encoded.ids, [(0, len(encoded.ids))], marked)
    asked = [span for span in marked.spans if span.asked]
    if asked and not _follows_prompt(marked, encoded, asked[-1].start, tokenizer):
        opening = marked.text[: asked[-1].start]
        encoded = encode_cut(tokenizer, encoded, opening, marked.origin, marked.literal)
    end_id = turn_end(tokenizer).id
    found, notes = [], []
    for span in marked.spans:
        start = encoded.token_from(span.start)
        end = encoded.token_at(span.end if span.closes else span.end - 1)
        if end is None or (span.asked and encoded.ids[end] != end_id):
            reason = "the tokenizer does not keep the token that ends an answer"
            raise RowRefused(marked.origin, reason)
        if start is None:
            notes.append(NOTE_MERGED)
        else:
            found.append((start, end + 1))
    return _sequence(encoded.ids, found, marked, notes)


def _follows_prompt(
    marked: Marked, encoded: Encoded, start: int, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether the tokens before an answer are those of the prompt that asks for it.

    Text is cut at added tokens before it is split, so what stands before the last one of the
    prompt has no say in how its end is split.
    """
    token = encoded.token_from(start)
    if token is None:
        return False
    tail = opening_end(tokenizer)
    if not tail or marked.text[start - len(tail) : start] != tail:
        cut = 0
        for found in added_tokens(tokenizer).finditer(marked.text, 0, start):
            if not any(
                found.start() < end and begin < found.end() for begin, end in marked.literal
            ):
                cut = found.start()
        tail = marked.text[cut:start]
        literal = [
            (begin - cut, end - cut) for begin, end in marked.literal if cut <= begin < start
        ]
        if literal:
            ids = encode_literally(tokenizer, tail, literal, marked.origin).ids
            return encoded.ids[token - len(ids) : token] == ids
    ids = _ids_of(tokenizer, tail)
    return encoded.ids[token - len(ids) : token] == ids


@lru_cache(maxsize=4096)
def _ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return encode(tokenizer, text)


def render_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """The example up to its last answer, for generation; None where nothing asks for one."""
    if isinstance(example, PlainText):
        return None
    if isinstance(example, PromptCompletion):
        marked = mark(example, tokenizer, "assistant")
        ids = with_bos(tokenizer, _ids_as_text(tokenizer, example.prompt, marked))
        reference = as_generated(tokenizer, example.completion, bool(marked.literal))
        return Prompt(tuple(ids), reference, example.origin) if ids else None
    number = len(example.messages) - 1
    if number == 0 or example.messages[-1].role != "assistant":
        return None
    opening = apply_template(example, tokenizer, number, prompt=True)
    said = example.messages[-1].content
    literal: tuple[tuple[int, int], ...] = ()
    try:
        text = apply_template(example, tokenizer)
        literal = spelled_in(example, text, tokenizer)
        found = find_answer(example, number, text, tokenizer, literal)
        said = text[len(opening) : found.end] if found else said
    except RowRefused:
        pass
    ids = _prompt_ids(example, opening, tokenizer)
    is_spelled = any(end > len(opening) for _, end in literal)
    return Prompt(tuple(ids), as_generated(tokenizer, said, is_spelled), example.origin)


def _prompt_ids(
    example: Conversation, opening: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """What a user spells of special tokens is text, as in training."""
    literal = spelled_in(example, opening, tokenizer, len(example.messages) - 1, prompt=True)
    if literal:
        return encode_literally(tokenizer, opening, literal, example.origin).ids
    return encode(tokenizer, opening)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that closes an assistant turn, as the template writes it.

    Raises:
        DataError: see `turn_end`.
    """
    return turn_end(tokenizer).id


def _sequence(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    marked: Marked,
    notes: Sequence[str] = (),
) -> TokenSequence:
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[max(start, 1) : end] = ids[max(start, 1) : end]
    said = tuple(dict.fromkeys([*marked.notes, *notes]))
    return TokenSequence(tuple(ids), tuple(labels), marked.origin, said)
