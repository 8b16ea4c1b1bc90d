"""From text to token ids, such that training sees the very tokens that generation sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from qlora_kit.data.template import RowRefused
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """Text as token ids, encoded in one piece or in several that are joined."""

    pieces: tuple[str, ...]
    batch: BatchEncoding
    """Its first texts are the pieces."""
    ids: list[int]

    @classmethod
    def of(cls, pieces: Sequence[str], batch: BatchEncoding) -> Encoded:
        rows = batch["input_ids"][: len(pieces)]
        return cls(tuple(pieces), batch, [token for row in rows for token in row])

    def token_at(self, character: int) -> int | None:
        """The token that a character of the text fell into; None where it left none."""
        place = self._place(character)
        return None if place is None else place[2]

    def token_from(self, character: int) -> int | None:
        """The token that begins at a character; None where one from before reaches into it."""
        place = self._place(character)
        if place is None:
            return None
        piece, offset, token = place
        before = sum(len(row) for row in self.batch["input_ids"][:piece])
        span = self.batch.token_to_chars(piece, token - before)
        return token if span is not None and span.start == offset else None

    def _place(self, character: int) -> tuple[int, int, int] | None:
        """Number of the piece, character in it, and token."""
        num_tokens = 0
        for number, piece in enumerate(self.pieces):
            if character < len(piece):
                token = self.batch.char_to_token(number, character)
                return None if token is None else (number, character, num_tokens + token)
            character -= len(piece)
            num_tokens += len(self.batch["input_ids"][number])
        return None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text as it stands, with nothing added."""
    ids: list[int] = _encode_all(tokenizer, [text])["input_ids"][0]
    return ids


def encode_after(
    tokenizer: PreTrainedTokenizerBase, text: str, openings: Sequence[str], origin: str
) -> tuple[Encoded, list[list[int]]]:
    """The text, beginning with the tokens of the last of its openings; and those of each.

    Where the tokenizer merges the end of that opening into what follows (two line breaks that
    are one token), the text is cut there, as generation cuts it.

    Raises:
        RowRefused: to cut it would change the text.
    """
    batch = _encode_all(tokenizer, [text, *openings])
    whole, prompts = Encoded.of([text], batch), batch["input_ids"][1:]
    if whole.ids[: len(prompts[-1])] == prompts[-1]:
        return whole, prompts
    pieces = [openings[-1], text[len(openings[-1]) :]]
    cut = Encoded.of(pieces, _encode_all(tokenizer, pieces))
    if decode(tokenizer, cut.ids) != decode(tokenizer, whole.ids):
        raise RowRefused(origin, "the first token of an answer begins before it")
    return cut, prompts


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False
) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def as_generated(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text as it would come back from a model that writes it, spaces around it apart."""
    return decode(tokenizer, encode(tokenizer, text), skip_special_tokens=True).strip()


def with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids that begin a sequence: with BOS, once, where the tokenizer puts one there."""
    bos_id = tokenizer.bos_token_id
    if _adds_bos(tokenizer) and ids[:1] != [bos_id]:
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


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    batch: BatchEncoding = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return batch


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos_id = tokenizer.bos_token_id
    return bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
