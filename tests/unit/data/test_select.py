"""Rows that are there twice, held out, or on both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data.examples import Conversation, Message, PlainText
from qlora_kit.data.prepare import Part, prepare_eval, prepare_train
from qlora_kit.data.schemas import content_key
from qlora_kit.data.select import (
    DUPLICATE,
    HELD_OUT,
    LEAK,
    NOT_HELD_OUT,
    Selection,
    held_out_threshold,
    lot,
)
from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSpec, SourceSpec

from .formats import tokenizer_of

TOKENIZER = tokenizer_of("chatml")
STOPS = frozenset({TOKENIZER.eos_token_id})


def spec_of(**values: Any) -> DataSpec:
    return DataSpec(train=(SourceSpec(path="a.jsonl"),), **values)


def text(content: str, number: int = 1) -> PlainText:
    return PlainText(content, f"a.jsonl:{number}")


def texts(count: int, start: int = 0) -> list[PlainText]:
    return [text(f"row {number}", number) for number in range(start, start + count)]


def rules(selection: Selection, examples: Sequence[PlainText]) -> list[str | None]:
    return [selection.rule_against(one) for one in examples]


def sides(folder: Path, rows: Sequence[str], eval_rows: Sequence[str] = (), **values: Any) -> Sides:
    """Both parts of a data set of texts."""
    sources = {}
    for name, contents in (("train", rows), ("eval", eval_rows)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in contents))
        sources[name] = (SourceSpec(path=str(path)),) if contents else ()
    spec = DataSpec(**sources, **values)
    return prepare_train(spec, TOKENIZER, STOPS), prepare_eval(spec, TOKENIZER, STOPS)


Sides = tuple[Part, Part]


def contents(part: Part) -> list[str]:
    decoded = [TOKENIZER.decode(one.input_ids) for one in part.sequences]
    return [one.removesuffix("<|im_end|>") for one in decoded]


def test_the_first_of_those_that_say_the_same_is_used() -> None:
    selection = Selection(spec_of(), "train")
    given = [text("a", 1), text("b", 2), text("a", 3), text("a", 4)]
    assert rules(selection, given) == [None, None, DUPLICATE, DUPLICATE]


def test_the_same_question_is_no_duplicate() -> None:
    def talk(answer: str, number: int) -> Conversation:
        turns = (Message("user", "hello"), Message("assistant", answer))
        return Conversation(turns, f"a.jsonl:{number}")

    selection = Selection(spec_of(), "train")
    assert selection.rule_against(talk("fine", 1)) is None
    assert selection.rule_against(talk("well", 2)) is None
    assert selection.rule_against(talk("fine", 3)) == DUPLICATE


def test_duplicates_can_be_kept_or_refused() -> None:
    given = [text("a", 1), text("a", 2)]
    assert rules(Selection(spec_of(duplicates="keep"), "train"), given) == [None, None]
    with pytest.raises(DataError, match=r"a.jsonl:2 is the same as a.jsonl:1, and data.duplicates"):
        rules(Selection(spec_of(duplicates="error"), "train"), given)


def test_eval_rows_of_their_own_are_all_measured() -> None:
    given = [text("a", 1), text("a", 2)]
    assert rules(Selection(spec_of(), "eval"), given) == [None, None]
    assert rules(Selection(spec_of(duplicates="error"), "eval"), given) == [None, None]


@pytest.mark.parametrize("leaks", ["drop", "keep", "error"])
def test_a_training_row_that_is_also_an_eval_row(leaks: str) -> None:
    keys = frozenset({content_key(text("b"))})
    selection = Selection(spec_of(leaks=leaks), "train", keys)
    assert selection.rule_against(text("a", 1)) is None
    if leaks == "error":
        with pytest.raises(
            DataError, match=r"a.jsonl:2 is the same as an eval row, and data.leaks"
        ):
            selection.rule_against(text("b", 2))
        return
    assert selection.rule_against(text("b", 2)) == (LEAK if leaks == "drop" else None)


def test_leaks_through_both_files(tmp_path: Path) -> None:
    train, held = sides(tmp_path, ["a", "b", "c"], ["b", "d", "d"])
    assert contents(train) == ["a", "c"]
    assert contents(held) == ["b", "d", "d"]
    assert train.ledger.set_aside == {LEAK: 1}
    assert train.ledger.examples[LEAK] == [f"{tmp_path / 'train.jsonl'}:2"]
    assert train.ledger.num_lost == 0
    train, _ = sides(tmp_path, ["a", "b", "c"], ["b", "d"], leaks="keep")
    assert contents(train) == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"data\.leaks is error"):
        sides(tmp_path, ["a", "b", "c"], ["b", "d"], leaks="error")


def test_lots_are_even() -> None:
    """So a share of all lots is that share of the rows; binomial, five standard deviations."""
    for share in (0.05, 0.3, 0.5):
        spec = spec_of(held_out=share)
        threshold = held_out_threshold(spec, ())
        held = sum(lot(content_key(one), spec.seed) < threshold for one in texts(4000))
        assert abs(held - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_a_lot_depends_on_what_is_said_and_on_the_seed() -> None:
    assert lot(content_key(text("a", 1)), 3) == lot(content_key(text("a", 2)), 3)
    assert lot(content_key(text("a")), 3) != lot(content_key(text("b")), 3)
    assert lot(content_key(text("a")), 3) != lot(content_key(text("a")), 4)
    assert 0 <= lot(content_key(text("a")), 2**32 - 1) < 2**64


@pytest.mark.parametrize("count", [1, 7, 39])
def test_a_number_is_held_out_exactly(count: int) -> None:
    spec = spec_of(held_out=count)
    rows = [*texts(40), *texts(10)]  # the same ones again count once
    threshold = held_out_threshold(spec, rows)
    found = rules(Selection(spec, "eval", threshold=threshold), texts(40))
    assert found.count(None) == count
    assert found.count(NOT_HELD_OUT) == 40 - count


@pytest.mark.parametrize("count", [40, 50])
def test_more_than_there_are_cannot_be_held_out(count: int) -> None:
    with pytest.raises(DataError, match=f"held_out is {count}, but there are only 40 different"):
        held_out_threshold(spec_of(held_out=count), [*texts(40), *texts(20)])


@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.integers(0, 60), min_size=40, max_size=90),
    held_out=st.sampled_from([0.2, 0.5, 1, 5]),
    duplicates=st.sampled_from(["drop", "keep"]),
    seed=st.integers(0, 9),
)
def test_no_row_is_on_both_sides_and_none_on_neither(
    tmp_path: Path, rows: list[int], held_out: float, duplicates: str, seed: int
) -> None:
    given = [f"row {one}" for one in rows] + [f"always {one}" for one in range(20)]
    train, held = sides(tmp_path, given, held_out=held_out, duplicates=duplicates, seed=seed)
    there, here = set(contents(held)), set(contents(train))
    assert not there & here
    assert there | here == set(given)
    if held_out >= 1:
        assert len(there) == held_out
    kept = len(train.sequences) + len(held.sequences)
    assert kept == (len(set(given)) if duplicates == "drop" else len(given))


def test_where_every_row_went(tmp_path: Path) -> None:
    rows = [f"row {number}" for number in range(50)]
    train, held = sides(tmp_path, [*rows, rows[0]], held_out=10)
    assert train.ledger.num_rows == held.ledger.num_rows == 51
    num_duplicates = train.ledger.set_aside[DUPLICATE] + held.ledger.set_aside[DUPLICATE]
    assert num_duplicates == 1
    assert held.ledger.num_kept == 10
    assert train.ledger.num_kept == 40
    assert train.ledger.set_aside[HELD_OUT] == 10 + held.ledger.set_aside[DUPLICATE]
    assert held.ledger.set_aside[NOT_HELD_OUT] == 40 + train.ledger.set_aside[DUPLICATE]
    assert [one.origin for one in held.examples] == [one.origin for one in held.sequences]


def test_rows_stay_on_their_side_when_others_come_or_go(tmp_path: Path) -> None:
    """So a share that is held out measures two versions of a data set on the same rows."""
    rows = [f"row {number}" for number in range(100)]
    train, held = sides(tmp_path, rows, held_out=0.3)
    more = [*rows, *(f"new {number}" for number in range(50))]
    random.Random(0).shuffle(more)
    more_train, more_held = sides(tmp_path, more, held_out=0.3)
    assert set(contents(held)) < set(contents(more_held))
    assert set(contents(train)) < set(contents(more_train))
    other, _ = sides(tmp_path, rows, held_out=0.3, seed=7)
    assert set(contents(other)) != set(contents(train))
