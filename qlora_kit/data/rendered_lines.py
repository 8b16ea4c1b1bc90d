"""Rendered sequences as JSON Lines, for other programs and other eyes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from qlora_kit.data.pieces import show
from qlora_kit.data.sequences import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered_lines(
    part: str, sequences: Iterable[TokenSequence], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """One line per sequence; `labels` are -100 where nothing is learned, and not shifted."""
    for sequence in sequences:
        shown = show(sequence, tokenizer).as_dict()
        values = {
            "part": part,
            "origin": sequence.origin,
            "text": shown["text"],
            "supervised": shown["supervised"],
            "input_ids": sequence.input_ids,
            "labels": sequence.labels,
            "notes": sequence.notes,
        }
        yield json.dumps(values, ensure_ascii=False) + "\n"
