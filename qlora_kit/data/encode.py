"""From text to token ids, such that training sees the very tokens that generation sees."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import added_tokens, control_tokens
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


# Whether special tokens are text is a state of the tokenizer, which threads share.
_ONE_AT_A_TIME = threading.Lock()

# Stand before a piece of a text while that is encoded, so that it does not begin one; the first
# with which it does not merge is taken.
_LEADS = ("\n", "0", ".")


@dataclass(frozen=True, slots=True)
class Piece:
    """A text, and its encoding; the first `lead_tokens` are of `lead` characters before it."""

    text: str
    encoding: Encoding
    lead: int = 0
    lead_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.encoding.ids
        return ids[self.lead_tokens :] if self.lead_tokens else ids


@dataclass(frozen=True, slots=True)
class Encoded:
    """Text as token ids, encoded in one piece or in several that are joined."""

    pieces: tuple[Piece, ...]
    ids: list[int]

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Encoded:
        if len(pieces) == 1:
            return cls(tuple(pieces), pieces[0].ids)
        return cls(tuple(pieces), [token for piece in pieces for token in piece.ids])

    def token_at(self, character: int) -> int | None:
        """The token that a character of the text fell into; None where it left none."""
        place = self._piece(character)
        if place is None:
            return None
        encoding, character, num_tokens = place
        token = encoding.char_to_token(character)
        return None if token is None else num_tokens + token

    def token_from(self, character: int) -> int | None:
        """The token that begins at a character; None where one from before reaches into it."""
        place = self._piece(character)
        if place is None:
            return None
        encoding, character, num_tokens = place
        token = encoding.char_to_token(character)
        if token is None:
            return None
        span = encoding.token_to_chars(token)
        return num_tokens + token if span is not None and span[0] == character else None

    def _piece(self, character: int) -> tuple[Encoding, int, int] | None:
        """The piece of a character, the character in it, and how many tokens stand before it."""
        num_tokens = 0
        for piece in self.pieces:
            if character < len(piece.text):
                return piece.encoding, character + piece.lead, num_tokens - piece.lead_tokens
            character -= len(piece.text)
            num_tokens += len(piece.ids)
        return None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as it stands, with nothing added."""
    ids: list[int] = encode_batch(tokenizer, [text])[0].ids
    return ids


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], as_text: bool = False
) -> list[Encoding]:
    """All texts at once, on all cores. With `as_text`, what spells a special token is text."""
    with _ONE_AT_A_TIME:
        batch = tokenizer(
            list(texts),
            add_special_tokens=False,
            verbose=False,
            return_attention_mask=False,
            split_special_tokens=as_text,
        )
    encodings: list[Encoding] = batch.encodings
    return encodings


def encode_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of all texts at once, on all cores, without where they came from: a third faster."""
    backend = tokenizer.backend_tokenizer
    with _ONE_AT_A_TIME:
        if not (backend.truncation or backend.padding or backend.encode_special_tokens):
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
    return [encoding.ids for encoding in encode_batch(tokenizer, texts)]


def encode_cut(
    tokenizer: PreTrainedTokenizerBase,
    whole: Encoded,
    opening: str,
    origin: str,
    literal: Sequence[tuple[int, int]] = (),
) -> Encoded:
    """The text cut behind its opening, as generation cuts it; `literal` as `encode_literally`.

    Raises:
        RowRefused: to cut it would change the text.
    """
    text = "".join(piece.text for piece in whole.pieces)
    cut_at = len(opening)
    before = [(start, min(end, cut_at)) for start, end in literal if start < cut_at]
    after = [(max(start - cut_at, 0), end - cut_at) for start, end in literal if end > cut_at]
    halves = [
        encode_literally(tokenizer, piece, ranges, origin).pieces
        for piece, ranges in ((opening, before), (text[cut_at:], after))
    ]
    cut = Encoded.of([*halves[0], *halves[1]])
    if decode(tokenizer, cut.ids) != decode(tokenizer, whole.ids):
        raise RowRefused(origin, "the first token of an answer begins before it")
    return cut


def encode_literally(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    literal: Sequence[tuple[int, int]],
    origin: str,
) -> Encoded:
    """The text, with what is spelled in its `literal` parts never read as a token of its own.

    Raises:
        RowRefused: this tokenizer cannot write it as text.
    """
    pieces: list[tuple[str, bool]] = []
    position = 0
    for start, end in literal:
        pieces.append((text[position:start], False))
        pieces += [(piece, True) for piece in _without_tokens(tokenizer, text[start:end])]
        position = end
    pieces = [one for one in [*pieces, (text[position:], False)] if one[0]]
    joined = Encoded.of(
        [Piece(one, encode_batch(tokenizer, [one], is_literal)[0]) for one, is_literal in pieces]
    )
    if not literal:
        return joined
    given = decode(tokenizer, encode(tokenizer, text))
    if len(pieces) > 1 and decode(tokenizer, joined.ids) != given:
        joined = Encoded.of([_led(tokenizer, *one, bool(n)) for n, one in enumerate(pieces)])
    if squeeze(decode(tokenizer, joined.ids)) not in (squeeze(text), squeeze(given)):
        reason = "spells a special token that this tokenizer cannot write as text"
        raise RowRefused(origin, reason)
    return joined


def _led(tokenizer: PreTrainedTokenizerBase, text: str, is_literal: bool, has_lead: bool) -> Piece:
    """A piece as it stands inside a text: some tokenizers write a space before what begins one."""
    for lead in _LEADS if has_lead else ():
        encoding = encode_batch(tokenizer, [lead + text], is_literal)[0]
        first = encoding.char_to_token(len(lead))
        span = None if first is None else encoding.token_to_chars(first)
        if first is not None and span is not None and span[0] == len(lead):
            return Piece(text, encoding, len(lead), first)
    return Piece(text, encode_batch(tokenizer, [text], is_literal)[0])


def _without_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text whole where it comes out as text, else in pieces, none of which holds a token."""
    ids = set(encode_batch(tokenizer, [text], as_text=True)[0].ids)
    spelled = {found.group() for found in control_tokens(tokenizer).finditer(text)}
    if ids.isdisjoint(map(tokenizer.convert_tokens_to_ids, spelled)):
        return [text]
    return _broken(text, added_tokens(tokenizer))


def _broken(text: str, tokens: re.Pattern[str]) -> list[str]:
    """The text in pieces, none of which holds one of the tokens."""
    pieces = []
    start = 0
    for found in tokens.finditer(text):
        if found.end() - found.start() > 1:
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
    return [*pieces, text[start:]]


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False
) -> str:
    """The text of ids as it stands: no spaces are tidied up around punctuation."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def as_generated(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> str:
    """A text as it would come back from a model that writes it, spaces around it apart."""
    ids = encode_batch(tokenizer, [text], as_text)[0].ids
    return decode(tokenizer, ids, skip_special_tokens=True).strip()


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with BOS by itself."""
    return _adds_bos(tokenizer, tokenizer.bos_token_id)


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids that begin a sequence: with BOS, once, where the tokenizer puts one there."""
    bos_id = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids[:1] != [bos_id]:
        return [bos_id, *ids]
    return ids


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends what has no template.

    Raises:
        DataError: there is none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so the model would never learn to stop; "
            "take another tokenizer with model.tokenizer_name_or_path."
        )
    assert isinstance(tokenizer.eos_token_id, int)
    return tokenizer.eos_token_id


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: PreTrainedTokenizerBase, bos_id: int | None) -> bool:
    return bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]


def squeeze(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())
