"""Flat arrays say the same as the sequences that they hold."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX, Block, Rendered, TokenSequence, flat


def sequence(tokens: list[tuple[int, bool]], origin: str, notes: tuple[str, ...]) -> TokenSequence:
    ids = tuple(token for token, _ in tokens)
    labels = tuple(token if yes else IGNORE_INDEX for token, yes in tokens)
    return TokenSequence(ids, labels, origin, notes)


SEQUENCES = st.lists(
    st.builds(
        sequence,
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=5),
        st.sampled_from(["a:1", "b:2"]),
        st.sampled_from([(), ("odd",)]),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(given=SEQUENCES, first=st.integers(0, 6), number=st.integers(0, 6))
def test_a_block_gives_back_its_sequences(
    given: list[TokenSequence], first: int, number: int
) -> None:
    block = Block.of(given)
    assert [block.sequence(one) for one in range(len(block))] == given
    assert block.lengths.tolist() == [one.num_tokens for one in given]
    assert block.num_supervised().tolist() == [one.num_supervised for one in given]
    first = min(first, len(given))
    end = min(first + number, len(given))
    run = block.run(first, end)
    assert [run.sequence(one) for one in range(len(run))] == given[first:end]
    assert run.starts.tolist() == Block.of(given[first:end]).starts.tolist()
    joined = Block.joined([block.run(0, first), block.run(first, len(given))])
    assert [joined.sequence(one) for one in range(len(joined))] == given


def test_what_was_refused_stands_in_its_place() -> None:
    kept = TokenSequence((1, 2), (IGNORE_INDEX, 2), "a:1")
    refused = RowRefused("a:2", "odd")
    rendered = Rendered(Block.of([kept, TokenSequence((), (), "a:2"), kept]), {1: refused})
    assert list(rendered) == [kept, refused, kept]


def test_flat() -> None:
    ids, ends = flat([[1, 2], (), [3]])
    assert ids.tolist() == [1, 2, 3]
    assert ids.dtype == np.int32
    assert ends.tolist() == [2, 2, 3]
    assert [len(one) for one in flat([])] == [0, 0]
