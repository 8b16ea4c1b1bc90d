"""Calibration text: drawn from any data source, with a seed, and counted in tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.quantize.method import Calibration, CalibrationNeed
from qlora_kit.quantize.texts import Texts
from qlora_kit.recipe.base import Spec

Sampling = Literal["whole", "random", "by-source", "by-length"]
DEFAULT_TOKENS = 16_384
DEFAULT_LENGTH = 512
_NUM_LENGTHS = 4


class CalibrationSpec(Spec):
    """How calibration text is drawn."""

    num_tokens: int | None = Field(default=None, ge=2)
    """How much; unset: as much as there is, up to 16384 tokens."""

    max_length: int | None = Field(default=None, ge=8)
    """Tokens that the model reads at once; a longer row is cut into several sequences. Unset: 512,
    or as many as the model attends to, where those are fewer."""

    sampling: Sampling = "random"
    """`whole`: from the first row on; `random`: any sequences; `by-source`: as many tokens of each
    source; `by-length`: as many tokens of short, middling and long sequences."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds the drawing."""

    def length_within(self, context: int | None) -> int:
        """Tokens of a sequence, for a model that attends to `context` tokens; None sets no limit.

        Raises:
            ModelError: more were asked for.
        """
        if context is None:
            return self.max_length or DEFAULT_LENGTH
        if self.max_length is not None and self.max_length > context:
            raise ModelError(
                f"calibration in sequences of {self.max_length} tokens exceeds the model's context "
                f"of {context}; set --calibration-length {context} or less."
            )
        return self.max_length or min(DEFAULT_LENGTH, context)


def require_wanted(need: CalibrationNeed, method: str, is_given: bool) -> None:
    """Calibration text where it is needed, and none where it would do nothing.

    Raises:
        DataError: says which.
    """
    if need == "required" and not is_given:
        raise DataError(
            f"{method} with these options is calibrated on text; name some with --calibration "
            "(a recipe, a file, wikitext2, c4, demo/commands)."
        )
    if need == "none" and is_given:
        raise DataError(
            f"{method} with these options looks at no text, so --calibration has no effect; leave "
            "it out."
        )


def draw_calibration(
    texts: Texts,
    rows: Sequence[Sequence[TokenSequence]],
    spec: CalibrationSpec,
    context: int | None,
) -> Calibration:
    """Draw from the rows of each source.

    Args:
        context: tokens that the model can attend to; None where nothing limits them.

    Raises:
        ModelError: sequences were asked for that are longer than that.
        DataError: there is less text than was asked for, or none.
    """
    length = spec.length_within(context)
    pieces = [
        [_Piece(place, piece) for row in source for piece in _cut(row, length)]
        for place, source in enumerate(rows)
    ]
    available = sum(piece.num_tokens for source in pieces for piece in source)
    if not available:
        raise DataError(
            f"{texts.description} has nothing left to calibrate on: every row is among those that "
            "the result is measured on; name other text with --calibration."
        )
    if spec.num_tokens is not None and available < spec.num_tokens:
        aside = (
            " besides the fifth of its rows that is put aside for the comparison (which --data, "
            "naming other text for that, sets free)"
            if texts.is_divided
            else ""
        )
        raise DataError(
            f"{spec.num_tokens:,} tokens were asked for calibration, and {texts.description} has "
            f"{available:,}{aside}; name more text, or ask for no more than {available:,} with "
            "--calibration-tokens."
        )
    wanted = spec.num_tokens or min(available, DEFAULT_TOKENS)
    drawn = _up_to(wanted, _order(pieces, spec))
    num_tokens = sum(piece.num_tokens for piece in drawn)
    of_each = _tokens_of_each(texts, drawn)
    return Calibration(
        sequences=tuple(piece.sequence for piece in drawn),
        num_tokens=num_tokens,
        description=(
            f"{num_tokens:,} of {available:,} tokens of {texts.description} in {len(drawn)} "
            f"sequences of at most {length}, drawn {_how(spec, of_each)}"
        ),
        tokens_by_source=of_each,
    )


@dataclass(frozen=True)
class _Piece:
    source: int
    """Place among the sources."""
    sequence: TokenSequence

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_tokens


def _tokens_of_each(texts: Texts, drawn: Sequence[_Piece]) -> dict[str, int]:
    """Tokens that were drawn from each source; of a file its name is told, and not where it is."""
    found: dict[str, int] = {}
    for place, source in enumerate(texts.sources):
        name = Path(source.name).name if Path(source.path).exists() else source.name
        if name in found:
            name = f"{name} ({place + 1})"
        found[name] = sum(piece.num_tokens for piece in drawn if piece.source == place)
    return found


def _how(spec: CalibrationSpec, tokens_by_source: Mapping[str, int]) -> str:
    """How they were drawn, and what each source gave where there are several."""
    parts = [spec.sampling if spec.sampling == "whole" else f"{spec.sampling}, seed {spec.seed}"]
    if len(tokens_by_source) > 1:
        each = ", ".join(f"{number:,} of {name}" for name, number in tokens_by_source.items())
        parts.append(f" ({each})")
    elif spec.sampling == "by-source":
        parts.append(" (there is one source, so at random)")
    return "".join(parts)


def _cut(row: TokenSequence, max_length: int) -> Iterator[TokenSequence]:
    """All of a row, in pieces that overlap nowhere; a last token alone is left out."""
    for start in range(0, row.num_tokens, max_length):
        end = min(start + max_length, row.num_tokens)
        if end - start > 1:
            yield TokenSequence(row.input_ids[start:end], row.labels[start:end], row.origin)


def _order(pieces: Sequence[Sequence[_Piece]], spec: CalibrationSpec) -> Iterator[_Piece]:
    """All pieces in the order in which they are drawn."""
    rng = random.Random(spec.seed)
    flat = [piece for source in pieces for piece in source]
    if spec.sampling == "whole":
        return iter(flat)
    if spec.sampling == "random":
        return iter(rng.sample(flat, len(flat)))
    strata = [list(source) for source in pieces if source]
    if spec.sampling == "by-length":
        by_length = sorted(flat, key=lambda piece: piece.num_tokens)
        step = -(-len(flat) // _NUM_LENGTHS)
        strata = [by_length[start : start + step] for start in range(0, len(flat), step)]
    return _balanced([rng.sample(stratum, len(stratum)) for stratum in strata])


def _balanced(strata: Sequence[Sequence[_Piece]]) -> Iterator[_Piece]:
    """Always from the stratum that has given the fewest tokens so far, while it has any."""
    left = [list(reversed(stratum)) for stratum in strata]
    given = [0] * len(strata)
    while any(left):
        place = min((n for n, stratum in enumerate(left) if stratum), key=lambda n: (given[n], n))
        piece = left[place].pop()
        given[place] += piece.num_tokens
        yield piece


def _up_to(num_tokens: int, pieces: Iterator[_Piece]) -> list[_Piece]:
    """The first ones, of `num_tokens` tokens together; the last is cut to fit."""
    drawn: list[_Piece] = []
    left = num_tokens
    for piece in pieces:
        if left <= 1:
            break
        whole = piece.sequence
        if whole.num_tokens > left:
            part = TokenSequence(whole.input_ids[:left], whole.labels[:left], whole.origin)
            piece = replace(piece, sequence=part)
        drawn.append(piece)
        left -= piece.num_tokens
    return drawn
