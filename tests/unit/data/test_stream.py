"""Rows that are read while training: all of them, in an order that the seed decides."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data import chunks, stream
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.prepare import prepare_train
from qlora_kit.data.render import Rendering
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.stream import READ_AHEAD, StreamedSequences
from qlora_kit.errors import DataError
from qlora_kit.recipe import load_recipe
from qlora_kit.recipe.data import DataSpec
from qlora_kit.train.loader import StreamedItems

from .formats import tokenizer_of

RECIPE = """
model: {name_or_path: demo/smollm2-135m-instruct}
data: {train: [{path: a.jsonl}], streaming: true}
"""


def talks(folder: Path, count: int, bad: int = 0) -> Path:
    path = folder / "talks.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"hello {number}"},
                    {"role": "assistant", "content": "fine " * (number % 5 + 1)},
                ]
            }
        )
        for number in range(count)
    ]
    path.write_text("\n".join([*lines, *["{broken"] * bad]) + "\n")
    return path


def stream_of(path: Path, **values: object) -> StreamedSequences:
    tokenizer = tokenizer_of("chatml")
    stops = frozenset({tokenizer.convert_tokens_to_ids("<|im_end|>")})
    values = {"train": [{"path": str(path)}], "streaming": True, "max_length": 64, **values}
    part = prepare_train(DataSpec.model_validate(values), tokenizer, stops)
    assert part.stream is not None
    return part.stream


def test_each_pass_gives_every_row_once_in_another_order(tmp_path: Path) -> None:
    stream = stream_of(talks(tmp_path, 20))
    once = [one.origin for one in islice(stream, 20) if isinstance(one, TokenSequence)]
    twice = [one.origin for one in islice(stream, 40) if isinstance(one, TokenSequence)]
    assert sorted(once) == sorted(set(once))
    assert twice[:20] == once
    assert sorted(twice[20:]) == sorted(once)
    assert twice[20:] != once
    assert once != sorted(once, key=lambda origin: int(origin.rpartition(":")[2]))


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    path = talks(tmp_path, 20)
    one, other = (
        [item.origin for item in islice(stream_of(path, seed=seed), 20)]  # type: ignore[union-attr]
        for seed in (1, 2)
    )
    assert one != other


def test_packed_as_they_come(tmp_path: Path) -> None:
    stream = stream_of(talks(tmp_path, 30)).packed(64)
    bins: list[PackedSequence] = []
    for item in stream:
        assert isinstance(item, PackedSequence)
        assert item.num_tokens <= 64
        bins.append(item)
        if sum(len(one.parts) for one in bins) == 30:
            break
    assert len({part.origin for one in bins for part in one.parts}) == 30


def test_the_first_pass_is_booked(tmp_path: Path) -> None:
    stream = stream_of(talks(tmp_path, 20))
    list(islice(stream, 45))
    ledger: Ledger = stream._ledger
    assert ledger.num_rows == ledger.num_kept == 20
    ledger.check_balance()


def test_too_many_bad_rows_stop_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not JSON"):
        stream_of(talks(tmp_path, 20, bad=5))


def test_bad_rows_far_on_stop_it_where_they_are_met(tmp_path: Path) -> None:
    stream = stream_of(talks(tmp_path, 3000, bad=200))
    with pytest.raises(DataError, match="200 of 3200 rows"):
        list(islice(stream, 3001))


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("", "train.max_steps"),
        (
            "train: {max_steps: 5, train_sampling_strategy: group_by_length}",
            "train.train_sampling_strategy",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(line: str, path: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + line)
    with pytest.raises(Exception, match=path.replace(".", r"\.")):
        load_recipe(recipe)


def test_a_stream_that_is_left_early_balances(tmp_path: Path) -> None:
    stream = stream_of(talks(tmp_path, 6000))
    taken = list(islice(stream, 10))
    stream.settle()
    ledger = stream._ledger
    assert ledger.num_kept == len(taken) == 10
    assert ledger.supervised_tokens == sum(one.num_supervised for one in taken)
    assert ledger.set_aside[READ_AHEAD] == ledger.num_rows - 10


@pytest.mark.parametrize("num_given", [7, 20, 26])
def test_going_on_books_what_was_given_before_also_where_nothing_follows(
    tmp_path: Path, num_given: int
) -> None:
    """A training that is done has no more update, and still its ledger is written."""
    path = talks(tmp_path, 20)
    whole, resumed = stream_of(path), stream_of(path)
    taken = [*islice(whole, num_given)]
    updates = StreamedItems(resumed, 1).updates(num_given)
    whole.settle()
    resumed.settle()
    assert resumed._ledger.as_dict() == whole._ledger.as_dict()
    assert whole._ledger.num_kept == min(len(taken), 20)
    assert next(updates) is not None


def untidy(folder: Path) -> Path:
    """Two files with rows that are there twice, are no JSON, have no answer, or are long."""
    for name, start in (("one", 0), ("two", 30)):
        rows: list[str] = []
        for number in range(start, start + 45):
            said = "fine " * (60 if number % 7 == 0 else number % 5 + 1)
            asked = {"role": "user", "content": f"hello {number}"}
            rows.append(json.dumps({"messages": [asked, {"role": "assistant", "content": said}]}))
            if number % 10 == 9:
                rows += ["{broken", json.dumps({"messages": [asked]}), rows[-1]]
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, "{broken"]) + "\n")
    return folder


def untidy_stream(folder: Path, capacity: int | None, overlength: str) -> StreamedSequences:
    found = stream_of(
        folder / "one.jsonl",
        train=[{"path": str(folder / f"{name}.jsonl")} for name in ("one", "two")],
        max_length=48,
        overlength=overlength,
        max_dropped_share=0.9,
    )
    return found if capacity is None else found.packed(capacity)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and chunks so small that a pass has several."""
    monkeypatch.setattr(stream, "BUFFER_SEQUENCES", 16)
    monkeypatch.setattr(chunks, "_CHUNK_ROWS", 6)


def as_kept(place: dict[str, Any] | None) -> Any:
    return json.loads(json.dumps(place))


@dataclass(frozen=True)
class Whole:
    """What a stream has given that nothing has stopped, and what it said after each item."""

    items: list[TokenSequence | PackedSequence]
    places: list[Any]
    """As a checkpoint keeps them."""
    late_places: list[Any]
    """The same, asked for when the loader was three items ahead."""
    ledgers: list[Ledger]
    """Settled."""
    num_items: int
    """Of a pass."""

    @classmethod
    def of(cls, one: StreamedSequences) -> Whole:
        items, places, late_places, ledgers = [], [None], [], []
        for number, item in enumerate(one, start=1):
            if one._is_first_over and number > 2 * one._ends[-1] + 30:
                break
            items.append(item)
            places.append(as_kept(one.place_of(number)))
            late_places.append(as_kept(one.place_of(max(number - 3, 0))))
            settled = deepcopy(one)
            settled.settle()
            ledgers.append(settled._ledger)
        return cls(items, places, late_places[2:], [Ledger(), *ledgers], one._ends[-1])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("capacity", "overlength"), [(None, "split"), (48, "split"), (48, "drop")])
def test_from_its_place_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, capacity: int | None, overlength: str
) -> None:
    """What follows, the ledger, and the place of a later item."""

    def fresh() -> StreamedSequences:
        return untidy_stream(untidy(tmp_path), capacity, overlength)

    whole = Whole.of(fresh())
    one_pass = whole.num_items
    assert whole.places[1]["first_pass"]["buffer"] == 0
    assert whole.places[one_pass]["first_pass"]["buffer"] > 1
    assert "ledger" in whole.places[one_pass + 1]
    numbers = (1, 2, 9, 16, 17, 18, 25, one_pass - 1)
    for num_given in (*numbers, *(one_pass + number for number in (0, *numbers, one_pass))):
        later = num_given + 7
        for place in (whole.places[num_given], whole.late_places[num_given]):
            resumed = fresh()
            given = resumed.starting_at(num_given, place)
            assert list(islice(given, 7)) == whole.items[num_given:later], num_given
            assert as_kept(resumed.place_of(later)) == whole.places[later], num_given
            resumed.settle()
            assert resumed._ledger == whole.ledgers[later], num_given


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("num_passes", [1, 3])
def test_what_came_before_its_place_is_not_rendered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_passes: int
) -> None:
    rendered: list[int] = []

    class Counting(Rendering):
        def __init__(self, examples: Any, *others: Any):
            rendered.append(len(examples))
            super().__init__(examples, *others)

    stopped, resumed, anew = (untidy_stream(untidy(tmp_path), 48, "split") for _ in range(3))
    num_given = len(list(islice(stopped, 40 if num_passes == 1 else 300)))
    monkeypatch.setattr(chunks, "Rendering", Counting)
    next(resumed.starting_at(num_given, as_kept(stopped.place_of(num_given))))
    some, _ = sum(rendered), rendered.clear()
    next(anew.starting_at(num_given))
    assert some <= 3 * 16, "a buffer, the chunk that it begins in, and what is read ahead"
    assert sum(rendered) > num_passes * some


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("num_given", [30, 200])
def test_a_place_of_other_rows_is_not_believed(tmp_path: Path, num_given: int) -> None:
    """Rows may change, where drift is allowed; they are then all read as they are now."""
    path = talks(tmp_path, 70)
    before = stream_of(path)
    list(islice(before, num_given))
    talks(tmp_path, 90)
    now = islice(stream_of(path), num_given, num_given + 30)
    place = before.place_of(num_given)
    assert list(islice(stream_of(path).starting_at(num_given, place), 30)) == list(now)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("num_given", [1, 30, 69])
def test_a_place_further_on_is_not_used(tmp_path: Path, num_given: int) -> None:
    """Another number of rows per update, where drift is allowed, begins elsewhere."""
    path = talks(tmp_path, 70)
    before = stream_of(path)
    list(islice(before, 100))
    now = islice(stream_of(path), num_given, num_given + 30)
    found = stream_of(path).starting_at(num_given, before.place_of(100))
    assert list(islice(found, 30)) == list(now)
