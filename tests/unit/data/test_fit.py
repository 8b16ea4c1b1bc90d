"""Sequences that are too long: dropped, cut or split, and every token is booked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.examples import Conversation, Example, Message, PlainText, PromptCompletion
from qlora_kit.data.fit import NOTHING_LEFT, NOTHING_SUPERVISED, OVERLENGTH, fit, fit_each, fit_runs
from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import IGNORE_INDEX, Block, Rendered, TokenSequence
from qlora_kit.recipe import DataSpec, SourceSpec

ORIGIN = "a.jsonl:1"
TALK = Conversation((Message("user", "hello"), Message("assistant", "fine")), ORIGIN)
TEXT = PlainText("hello", ORIGIN)
CONTINUED = PromptCompletion("hello", " fine", ORIGIN)


def spec_of(max_length: int, overlength: str) -> DataSpec:
    train = (SourceSpec(path="a.jsonl"),)
    return DataSpec(train=train, max_length=max_length, overlength=overlength)  # type: ignore[arg-type]


def sequence(pattern: str, *notes: str) -> TokenSequence:
    """A token for each letter; `x` is supervised."""
    ids = tuple(range(10, 10 + len(pattern)))
    labels = tuple(
        token if letter == "x" else IGNORE_INDEX for token, letter in zip(ids, pattern, strict=True)
    )
    return TokenSequence(ids, labels, ORIGIN, notes)


def fitted(
    example: Example, pattern: str, max_length: int, overlength: str
) -> tuple[list[TokenSequence], Ledger]:
    ledger = Ledger(num_rows=1)
    kept = fit(example, sequence(pattern), spec_of(max_length, overlength), ledger)
    ledger.check_balance()
    return kept, ledger


def booked(ledger: Ledger) -> dict[str, int]:
    counted: dict[str, Any] = ledger.as_dict()["tokens"]
    return {name: count for name, count in counted.items() if count}


@pytest.mark.parametrize("overlength", ["drop", "truncate", "split", "error"])
@pytest.mark.parametrize("example", [TALK, TEXT, CONTINUED])
def test_what_fits_stays_as_it_is(example: Example, overlength: str) -> None:
    ledger = Ledger(num_rows=1)
    given = sequence("..xx..xx", "a note")
    assert fit(example, given, spec_of(8, overlength), ledger) == [given]
    assert booked(ledger) == {"rendered": 8, "supervised": 4, "context": 4}
    assert ledger.noted == {"a note": 1}
    assert ledger.num_kept == 1
    ledger.check_balance()


@pytest.mark.parametrize("overlength", ["drop", "truncate", "split", "error"])
@pytest.mark.parametrize("pattern", [".", "x", "....", "." * 40])
def test_without_a_supervised_token_it_is_dropped(pattern: str, overlength: str) -> None:
    """Nothing predicts a first token, so that one does not count."""
    kept, ledger = fitted(TALK, pattern, 8, overlength)
    assert kept == []
    assert ledger.dropped == {NOTHING_SUPERVISED: 1}
    assert booked(ledger) == {"rendered": len(pattern), "dropped": len(pattern)}


@pytest.mark.parametrize("overlength", ["drop", "error"])
@pytest.mark.parametrize("example", [TALK, CONTINUED])
def test_dropped(example: Example, overlength: str) -> None:
    kept, ledger = fitted(example, "....xxxxx", 8, overlength)
    assert kept == []
    assert ledger.dropped == {OVERLENGTH: 1}
    assert ledger.examples == {OVERLENGTH: [f"{ORIGIN} (9 tokens)"]}
    assert booked(ledger) == {"rendered": 9, "dropped": 9}


@pytest.mark.parametrize(
    ("pattern", "supervised", "ends_cut"),
    [
        ("....xxxxxx", 4, 1),  # in the middle of an answer
        (".....xxx..", 3, 0),  # right behind one
        ("..xx....xx", 2, 0),  # right before one
        ("..xx...xxx", 3, 1),  # behind its first token
    ],
)
def test_truncated(pattern: str, supervised: int, ends_cut: int) -> None:
    kept, ledger = fitted(TALK, pattern, 8, "truncate")
    whole = sequence(pattern)
    assert kept == [TokenSequence(whole.input_ids[:8], whole.labels[:8], ORIGIN)]
    assert (ledger.truncated, ledger.ends_cut, ledger.num_lost) == (1, ends_cut, 1)
    expected = {"rendered": 10, "supervised": supervised, "context": 8 - supervised, "cut": 2}
    assert booked(ledger) == expected
    assert (END_CUT in ledger.examples) == bool(ends_cut)
    assert TRUNCATED in ledger.examples


def test_a_row_of_which_nothing_supervised_would_be_left_is_dropped() -> None:
    for pattern in ("........xx", "x.......xx"):
        kept, ledger = fitted(TALK, pattern, 8, "truncate")
        assert kept == []
        assert ledger.dropped == {NOTHING_LEFT: 1}
        assert ledger.truncated == 0
        assert booked(ledger) == {"rendered": 10, "dropped": 10}


def test_split() -> None:
    kept, ledger = fitted(TALK, "..xxxxxxxxxxx", 8, "split")
    first, second = kept
    assert first.input_ids == tuple(range(10, 18))
    assert second.input_ids == (17, 18, 19, 20, 21, 22)
    assert second.labels == (IGNORE_INDEX, 18, 19, 20, 21, 22)
    assert (ledger.split, ledger.num_kept, ledger.num_lost) == (1, 1, 0)
    assert booked(ledger) == {"rendered": 13, "repeated": 1, "supervised": 11, "context": 3}


def test_a_piece_without_a_supervised_token_is_cut() -> None:
    kept, ledger = fitted(TALK, "." * 16 + "xx", 8, "split")
    assert [one.labels[-1] for one in kept] == [27]
    assert booked(ledger)["cut"] == 16
    assert ledger.num_kept == 1


@pytest.mark.parametrize("overlength", ["drop", "truncate", "error"])
def test_a_text_is_split_whatever_the_rule(overlength: str) -> None:
    kept, ledger = fitted(TEXT, ".xxxxxxxxxxxx", 8, overlength)
    assert [one.num_supervised for one in kept] == [7, 5]
    assert ledger.num_lost == 0


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    pattern=st.text(alphabet=".x", min_size=1, max_size=60),
    max_length=st.integers(8, 20),
    overlength=st.sampled_from(["drop", "truncate", "split", "error"]),
    example=st.sampled_from([TALK, TEXT, CONTINUED]),
)
def test_every_token_is_in_one_place(
    pattern: str, max_length: int, overlength: str, example: Example
) -> None:
    kept, ledger = fitted(example, pattern, max_length, overlength)  # which checks the balance
    assert ledger.num_kept + sum(ledger.dropped.values()) == 1
    assert bool(kept) == bool(ledger.num_kept)
    assert all(len(one.input_ids) == len(one.labels) <= max_length for one in kept)
    assert all(one.num_supervised for one in kept)
    assert ledger.rendered_tokens == len(pattern)
    assert ledger.supervised_tokens == sum(one.num_supervised for one in kept)
    assert ledger.supervised_tokens + ledger.context_tokens == sum(
        len(one.input_ids) for one in kept
    )
    for one in kept:
        for token, label in zip(one.input_ids, one.labels, strict=True):
            assert label in (token, IGNORE_INDEX)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(pattern=st.text(alphabet=".x", min_size=2, max_size=60), max_length=st.integers(8, 20))
def test_a_split_row_predicts_each_supervised_token_once(pattern: str, max_length: int) -> None:
    kept, _ = fitted(TEXT, pattern, max_length, "split")
    learned = [label for one in kept for label in one.labels[1:] if label != IGNORE_INDEX]
    whole = sequence(pattern)
    assert learned == [label for label in whole.labels[1:] if label != IGNORE_INDEX]


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.text("x.", max_size=12), st.booleans(), st.booleans()), max_size=8),
    overlength=st.sampled_from(["drop", "truncate", "split"]),
)
def test_in_runs_and_one_by_one(rows: list[tuple[str, bool, bool]], overlength: str) -> None:
    spec, examples = spec_of(8, overlength), [TALK] * len(rows)
    refused = {n: RowRefused(ORIGIN, "odd") for n, (_, _, is_odd) in enumerate(rows) if is_odd}
    given = [
        sequence("" if number in refused else pattern, *["merged"] * has_note)
        for number, (pattern, has_note, _) in enumerate(rows)
    ]
    rendered = Rendered(Block.of(given), refused)
    by_runs, by_rows = Ledger(num_rows=len(rows)), Ledger(num_rows=len(rows))
    found, sources = [], []
    for first, end, block in fit_runs(examples, rendered, spec, by_runs):
        found += [block.sequence(number) for number in range(len(block))]
        sources += list(range(first, end))
    assert found == list(fit_each(examples, rendered, spec, by_rows))
    assert by_runs.state() == by_rows.state()
    assert len(sources) == len(found)
    assert sources == sorted(sources)
    by_runs.check_balance()
