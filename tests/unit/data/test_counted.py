"""Answers found in many rows at once are those found in each row by itself."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.counted import Turn, count_answers
from qlora_kit.data.mark import Marked
from qlora_kit.data.sequences import IGNORE_INDEX

# 1 begins every turn, 1 2 that of an answer, 3 ends one.
TURN = Turn((1, 2), 3)
ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([1, 2, 3, 4]), max_size=8),
        st.sets(st.integers(0, 3), max_size=3).map(lambda found: tuple(sorted(found))),
    ),
    max_size=5,
)


def marked(openings: tuple[int, ...], number: int) -> Marked:
    return Marked("", (), f"a:{number}", is_templated=True, openings=openings)


def labels_of(ids: list[int], openings: tuple[int, ...]) -> list[int] | None:
    """One row, step by step; None where an answer is not found."""
    labels = [IGNORE_INDEX] * len(ids)
    places = [place for place, token in enumerate(ids) if token == 1]
    for wanted in openings:
        if wanted >= len(places) or ids[places[wanted] : places[wanted] + 2] != [1, 2]:
            return None
        start = places[wanted] + 2
        if 3 not in ids[start:]:
            return None
        end = ids.index(3, start) + 1
        labels[start:end] = ids[start:end]
    return labels


@settings(deadline=None, max_examples=500)
@given(rows=ROWS)
def test_as_row_by_row(rows: list[tuple[list[int], tuple[int, ...]]]) -> None:
    given = [marked(openings, number) for number, (_, openings) in enumerate(rows)]
    block, are_found = count_answers(given, [ids for ids, _ in rows], TURN)
    assert len(block) == len(are_found) == len(rows)
    for number, (ids, openings) in enumerate(rows):
        expected = labels_of(ids, openings)
        assert bool(are_found[number]) == (expected is not None)
        found = block.sequence(number)
        assert found.input_ids == tuple(ids)
        assert found.origin == f"a:{number}"
        if expected is not None:
            assert found.labels == tuple(expected)


def test_an_answer_without_an_end_does_not_reach_into_the_next_row() -> None:
    given = [marked((0,), 1), marked((0,), 2)]
    block, are_found = count_answers(given, [[1, 2, 4], [1, 2, 4, 3]], TURN)
    assert are_found.tolist() == [False, True]
    assert block.sequence(0).labels == (IGNORE_INDEX,) * 3
    assert block.sequence(1).labels == (IGNORE_INDEX, IGNORE_INDEX, 4, 3)
