"""Sequences cut into pieces that people can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.data.encode import decode
from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens that together make whole characters: mostly one, several where they share one."""

    text: str
    ids: tuple[int, ...]
    is_supervised: bool
    is_special: bool
    """Whether it is a token of its own that no text is split into."""


@dataclass(frozen=True)
class Shown:
    """One sequence for people to read."""

    origin: str
    notes: tuple[str, ...]
    pieces: tuple[Piece, ...]
    num_tokens: int
    num_supervised: int

    @property
    def supervised_text(self) -> str:
        return "".join(piece.text for piece in self.pieces if piece.is_supervised)

    def as_dict(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "text": "".join(piece.text for piece in self.pieces),
            "supervised": [text for text, is_supervised in runs(self.pieces) if is_supervised],
            "num_tokens": self.num_tokens,
            "num_supervised": self.num_supervised,
            "notes": list(self.notes),
        }


def show(sequence: TokenSequence, tokenizer: PreTrainedTokenizerBase) -> Shown:
    """A sequence cut into pieces."""
    pieces = tuple(token_pieces(sequence.input_ids, sequence.labels, tokenizer))
    return Shown(
        sequence.origin, sequence.notes, pieces, sequence.num_tokens, sequence.num_supervised
    )


def token_pieces(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Piece]:
    """The text of a sequence, piece by piece; joined, it is what all its ids decode to.

    A token's text can depend on the one before it (a space that SentencePiece leaves out at the
    start), so each is decoded behind its predecessor.
    """
    added = {
        number for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()
    }
    before: list[int] = []
    piece: list[int] = []
    for number, token in enumerate(input_ids):
        piece.append(token)
        context, text = decode(tokenizer, before), decode(tokenizer, [*before, *piece])
        is_supervised = labels[number] != IGNORE_INDEX
        may_go_on = (
            text.endswith(_UNFINISHED)
            and number + 1 < len(input_ids)
            and input_ids[number + 1] not in added
            and (labels[number + 1] != IGNORE_INDEX) == is_supervised
        )
        if may_go_on and not _is_whole(text, [*before, *piece, input_ids[number + 1]], tokenizer):
            continue
        yield Piece(text[len(context) :], tuple(piece), is_supervised, token in added)
        before, piece = piece, []


def _is_whole(text: str, longer: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what ends like half a character stays so with the next token: it is a U+FFFD."""
    decoded = decode(tokenizer, longer)
    return decoded != text and decoded.startswith(text)


def runs(pieces: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Text in stretches that are supervised or are not."""
    found: list[tuple[list[str], bool]] = []
    for piece in pieces:
        if not found or found[-1][1] != piece.is_supervised:
            found.append(([], piece.is_supervised))
        found[-1][0].append(piece.text)
    return [("".join(texts), is_supervised) for texts, is_supervised in found]
