"""How many rows of each source make one pass, and in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from qlora_kit.data.mixing import training_order
from qlora_kit.recipe import DataSpec, SourceSpec


def spec_of(*sources: dict[str, Any], **values: Any) -> DataSpec:
    specs = tuple(SourceSpec(path=f"{n}.jsonl", **one) for n, one in enumerate(sources))
    return DataSpec(train=specs, **values)


def sources_of(*sizes: int) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def order_of(sizes: tuple[int, ...], spec: DataSpec) -> list[int]:
    order = training_order(sources_of(*sizes), spec)
    assert order.dtype == np.int64
    return order.tolist()


def counts(sizes: tuple[int, ...], order: list[int]) -> list[int]:
    found = Counter(sources_of(*sizes)[order].tolist())
    return [found[number] for number in range(len(sizes))]


def test_one_after_the_other_is_the_order_of_the_files() -> None:
    assert order_of((3, 2), spec_of({}, {})) == [0, 1, 2, 3, 4]


def test_a_source_without_rows() -> None:
    assert order_of((0, 2), spec_of({}, {})) == [0, 1]
    assert order_of((0, 2), spec_of({"num_rows": 3}, {})) == [0, 1]
    assert order_of((0, 0), spec_of({}, {}, mix="all_exhausted")) == []
    assert order_of((0, 2), spec_of({}, {}, mix="all_exhausted")) == [0, 1]
    assert order_of((0, 2), spec_of({}, {}, mix="first_exhausted")) == [0, 1]


@pytest.mark.parametrize("num_rows", [1, 4, 5, 9, 10, 12])
def test_a_number_of_rows(num_rows: int) -> None:
    """Each row as often as any other, or once more; and only of that source."""
    order = order_of((5, 2), spec_of({"num_rows": num_rows}, {}))
    assert order[num_rows:] == [5, 6]
    drawn = Counter(order[:num_rows])
    assert set(drawn) <= set(range(5))
    assert sum(drawn.values()) == num_rows
    often = [drawn[row] for row in range(5)]
    assert max(often) - min(often) <= 1
    assert max(often) == -(-num_rows // 5)


def test_a_number_of_rows_is_drawn_anew_from_the_whole_source() -> None:
    """Not its first ones; and each pass is shuffled on its own."""
    order = order_of((100,), spec_of({"num_rows": 300}))
    assert sorted(order[:100]) == sorted(order[100:200]) == list(range(100))
    assert order[:100] != order[100:200]
    assert max(order_of((100,), spec_of({"num_rows": 10}))) > 20


def test_sources_of_the_same_size_are_not_drawn_alike() -> None:
    order = order_of((50, 50), spec_of({"num_rows": 50}, {"num_rows": 50}))
    assert order[:50] != [one - 50 for one in order[50:]]


@pytest.mark.parametrize("mix", ["concatenate", "first_exhausted", "all_exhausted"])
def test_the_same_recipe_gives_the_same(mix: str) -> None:
    sizes, sources = (30, 40), ({"num_rows": 20}, {})
    first = order_of(sizes, spec_of(*sources, mix=mix, seed=3))
    assert order_of(sizes, spec_of(*sources, mix=mix, seed=3)) == first
    assert order_of(sizes, spec_of(*sources, mix=mix, seed=4)) != first


def test_until_the_first_has_given_all() -> None:
    sizes = (1000, 300)
    order = order_of(sizes, spec_of({}, {}, mix="first_exhausted"))
    assert len(order) == len(set(order)), "nothing is there twice"
    taken = counts(sizes, order)
    assert taken[1] == 300
    assert abs(taken[0] - 300) < 5 * (2 * 300) ** 0.5
    for start, size in ((0, taken[0]), (1000, taken[1])):
        own = [one for one in order if (one >= 1000) == (start == 1000)]
        assert own == list(range(start, start + size)), "each in its order"


def test_until_each_has_given_all() -> None:
    sizes = (1000, 300)
    order = order_of(sizes, spec_of({}, {}, mix="all_exhausted"))
    assert set(order) == set(range(1300))
    taken = counts(sizes, order)
    assert taken[0] == 1000, "it ends when the last of them has given all"
    assert order[-1] == 999
    again = Counter(one for one in order if one >= 1000)
    assert max(again.values()) - min(again.values()) <= 1, "one round after the other"


@pytest.mark.parametrize("mix", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (0.7, 0.2, 0.1), (9.0, 0.5, 0.5)])
def test_weights_hold_within_what_chance_allows(mix: str, weights: tuple[float, ...]) -> None:
    sizes = (4000, 4000, 4000)
    sources = [{"weight": weight} for weight in weights]
    order = order_of(sizes, spec_of(*sources, mix=mix))
    total = sum(weights)
    for taken, weight in zip(counts(sizes, order), weights, strict=True):
        share = weight / total
        deviation = (len(order) * share * (1 - share)) ** 0.5
        assert abs(taken - len(order) * share) < 5 * deviation + 1


def test_a_weight_that_is_not_named_is_one() -> None:
    sizes = (3000, 3000)
    spec = spec_of({"weight": 3.0}, {}, mix="first_exhausted")
    taken = counts(sizes, order_of(sizes, spec))
    assert taken[0] / sum(taken) == pytest.approx(0.75, abs=0.04)


def test_a_number_of_rows_is_drawn_before_it_is_mixed() -> None:
    sizes = (50, 400)
    spec = spec_of({"num_rows": 20}, {"num_rows": 100}, mix="all_exhausted")
    order = order_of(sizes, spec)
    assert len({one for one in order if one < 50}) == 20
    assert len({one for one in order if one >= 50}) == 100
