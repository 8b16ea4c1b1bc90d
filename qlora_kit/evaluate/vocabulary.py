"""Do the entries of two vocabularies stand for the same tokens?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The token that each entry stands for."""
    return {number: token for token, number in tokenizer.get_vocab().items()}


def vocabulary_difference(one: Mapping[int, str], other: Mapping[int, str]) -> str | None:
    """What differs at the entries that both know, in words; None where nothing does.

    Entries that only one of them knows (padding to a round number, tokens added to one of them)
    are no difference.
    """
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return "the two vocabularies have nothing in common"
    unlike = [number for number in shared if one[number] != other[number]]
    if not unlike:
        return None
    first = unlike[0]
    return (
        f"its tokens are others: {len(unlike):,} of {len(shared):,} entries differ, the first of "
        f"them {first}, which is {other[first]!r} and not {one[first]!r}"
    )
