"""The text that a result is compared with its source on, and none of which calibrated it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.quantize.texts import DEMO_DATA, Texts, find_texts, render_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_SHARE = 0.2
"""Of the rows of calibration text, where the comparison has none of its own."""


@dataclass(frozen=True)
class HeldOut:
    """Sequences, and for a person where they come from."""

    sequences: tuple[TokenSequence, ...]
    description: str


@dataclass(frozen=True)
class Named:
    """What the user named for calibration and for the comparison; None where nothing."""

    calibration: str | None
    data: str | None


NOTHING_NAMED = Named(None, None)


def texts_for(
    named: Named, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Texts | None, list[list[TokenSequence]], HeldOut]:
    """Calibration texts with their rows, and held-out text that has no row in common with them.

    Where no held-out text is named it is: of a recipe that calibrates its eval sources; of a data
    set that is divided its other part; of any other source a fifth of its rows, which then do not
    calibrate; and without calibration the demo's rows.

    Raises:
        DataError: a source cannot be read, or nothing is left to compare on.
    """
    texts = None if named.calibration is None else find_texts(named.calibration, "train")
    rows: list[list[TokenSequence]] = []
    if texts is not None:
        rendered = render_texts(texts, tokenizer)
        rows, texts = rendered.rows, replace(texts, description=rendered.description)
    own = _own_held_out(named, texts)
    if own is None:
        assert texts is not None
        rows, held = _divide(rows, seed)
        texts = replace(texts, is_divided=True)
        return texts, rows, HeldOut(held, f"a fifth of the rows of {texts.description}")
    known = {row.input_ids for source in rows for row in source}
    rendered = render_texts(own, tokenizer)
    found = [row for source in rendered.rows for row in source]
    apart = tuple(row for row in found if row.input_ids not in known)
    if not apart:
        raise DataError(
            f"every row of {own.description} is among the calibration text; name other text to "
            "compare on with --data."
        )
    left_out = len(found) - len(apart)
    note = f", {left_out} of whose rows are left out because they calibrate" if left_out else ""
    return texts, rows, HeldOut(apart, rendered.description + note)


def _own_held_out(named: Named, texts: Texts | None) -> Texts | None:
    """None where it has to be taken from the calibration text."""
    if named.data is not None:
        return find_texts(named.data, "eval")
    if texts is None or named.calibration is None:
        return find_texts(DEMO_DATA, "eval")
    if texts.recipe_part is not None and not texts.recipe_part[0].has_eval_rows:
        return None
    apart = find_texts(named.calibration, "eval")
    is_same = apart.sources == texts.sources and texts.recipe_part is None
    return None if is_same else apart


def _divide(
    rows: Sequence[Sequence[TokenSequence]], seed: int
) -> tuple[list[list[TokenSequence]], tuple[TokenSequence, ...]]:
    """A fifth of the rows, at least one, apart from the others; a single row is cut in two."""
    flat = [row for source in rows for row in source]
    if len({row.input_ids for row in flat}) == 1:
        (row,) = {row.input_ids: row for row in flat}.values()
        cut = int(row.num_tokens * (1 - HELD_OUT_SHARE))
        if cut < 2 or row.num_tokens - cut < 2:
            raise DataError(
                f"{row.origin} alone has {row.num_tokens} tokens, too few to calibrate and to "
                "compare on; name more text, or other text to compare on with --data."
            )
        first = TokenSequence(row.input_ids[:cut], row.labels[:cut], row.origin)
        return [[first]], (TokenSequence(row.input_ids[cut:], row.labels[cut:], row.origin),)
    unique = sorted({row.input_ids for row in flat})
    count = max(1, int(len(unique) * HELD_OUT_SHARE))
    held = set(random.Random(seed).sample(unique, count))
    kept = [[row for row in source if row.input_ids not in held] for source in rows]
    found = {row.input_ids: row for row in flat if row.input_ids in held}
    return kept, tuple(found.values())
