"""Rows that are read while training: all of them, in an order that the seed decides."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pack import PackedSequence
from qlora_kit.data.prepare import prepare_train
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
