"""Calibration text: drawn from any data source, with a seed, and counted in tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError, ModelError
from qlora_kit.quantize.method import Calibration, CalibrationNeed
from qlora_kit.quantize.texts import Texts
from qlora_kit.recipe.base import Spec

Sampling = Literal["whole", "random", "by-source", "by-length"]
DEFAULT_TOKENS = 16_384
_NUM_LENGTHS = 4


class CalibrationSpec(Spec):
    """How calibration text is drawn."""

    num_tokens: int | None = Field(default=None, gt=0)
    """How much; unset: as much as there is, up to 16384 tokens."""

    max_length: int = Field(default=512, ge=8)
    """Tokens that the model reads at once; a longer row is cut into several sequences."""

    sampling: Sampling = "random"
    """`whole`: from the first row on; `random`: any sequences; `by-source`: as many tokens of each
    source; `by-length`: as many tokens of short, middling and long sequences."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds the drawing."""


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
        context: tokens that the model can attend to.

    Raises:
        ModelError: a sequence would be longer than that.
        DataError: there is less text than was asked for.
    """
    if context is not None and spec.max_length > context:
        raise ModelError(
            f"calibration in sequences of {spec.max_length} tokens exceeds the model's context of "
            f"{context}; set --calibration-length {context} or less."
        )
    pieces = [[piece for row in source for piece in _cut(row, spec.max_length)] for source in rows]
    available = sum(piece.num_tokens for source in pieces for piece in source)
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
    how = "" if spec.sampling == "whole" else f", seed {spec.seed}"
    return Calibration(
        sequences=tuple(drawn),
        num_tokens=num_tokens,
        description=(
            f"{num_tokens:,} of {available:,} tokens of {texts.description} in {len(drawn)} "
            f"sequences of at most {spec.max_length}, drawn {spec.sampling}{how}"
        ),
    )


def _cut(row: TokenSequence, max_length: int) -> Iterator[TokenSequence]:
    """All of a row, in pieces that overlap nowhere; a last token alone is left out."""
    for start in range(0, row.num_tokens, max_length):
        end = min(start + max_length, row.num_tokens)
        if end - start > 1:
            yield TokenSequence(row.input_ids[start:end], row.labels[start:end], row.origin)


def _order(
    pieces: Sequence[Sequence[TokenSequence]], spec: CalibrationSpec
) -> Iterator[TokenSequence]:
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


def _balanced(strata: Sequence[Sequence[TokenSequence]]) -> Iterator[TokenSequence]:
    """Always from the stratum that has given the fewest tokens so far, while it has any."""
    left = [list(reversed(stratum)) for stratum in strata]
    given = [0] * len(strata)
    while any(left):
        place = min((n for n, stratum in enumerate(left) if stratum), key=lambda n: (given[n], n))
        piece = left[place].pop()
        given[place] += piece.num_tokens
        yield piece


def _up_to(num_tokens: int, pieces: Iterator[TokenSequence]) -> list[TokenSequence]:
    """The first ones, of `num_tokens` tokens together; the last is cut to fit."""
    drawn: list[TokenSequence] = []
    left = num_tokens
    for piece in pieces:
        if left <= 1:
            break
        if piece.num_tokens > left:
            piece = TokenSequence(piece.input_ids[:left], piece.labels[:left], piece.origin)
        drawn.append(piece)
        left -= piece.num_tokens
    return drawn
