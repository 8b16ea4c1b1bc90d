"""Sums that must hold, and what is shown of them."""

from __future__ import annotations

import json

import pytest

from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger


def test_findings_say_how_many_and_where() -> None:
    ledger = Ledger(num_rows=2000, truncated=1, ends_cut=1)
    for number in range(1200):
        ledger.drop("too long", f"a:{number}", num_tokens=10)
    ledger.note("odd", "b:1")
    ledger.example(TRUNCATED, "c:1")
    ledger.example(END_CUT, "c:1")
    assert ledger.findings() == [
        "1,200 of 2,000 rows: dropped, too long (a:0, a:1, a:2, …)",
        "1 of 2,000 rows: truncated (c:1)",
        "1 of 2,000 rows: the end token of an answer was cut off (c:1)",
        "1 of 2,000 rows: odd (b:1)",
    ]
    assert ledger.dropped_tokens == 12000
    assert ledger.num_lost == 1201


def test_nothing_to_find() -> None:
    assert Ledger(num_rows=3, num_kept=3).findings() == []


@pytest.mark.parametrize(
    "counts",
    [
        {"num_rows": 2, "num_kept": 1},
        {"rendered_tokens": 5, "supervised_tokens": 4},
        {"rendered_tokens": 5, "supervised_tokens": 5, "repeated_tokens": 1},
        {"cut_tokens": 1},
    ],
)
def test_what_does_not_add_up(counts: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="do not balance"):
        Ledger(**counts).check_balance()


def test_what_adds_up() -> None:
    ledger = Ledger(num_rows=3, num_kept=2, rendered_tokens=10, repeated_tokens=1)
    ledger.drop("too long", "a:1", num_tokens=4)
    ledger.supervised_tokens, ledger.context_tokens, ledger.cut_tokens = 3, 2, 2
    ledger.check_balance()


def test_rows_set_aside_balance_and_are_no_loss() -> None:
    ledger = Ledger(num_rows=2, num_kept=1)
    ledger.put_aside("held out", "a:2")
    ledger.check_balance()
    assert ledger.num_lost == 0
    assert ledger.findings() == ["1 of 2 rows: set aside, held out (a:2)"]


def test_what_is_particular_to_a_row_stands_with_its_origin() -> None:
    ledger = Ledger(num_rows=2)
    ledger.drop("no answer", "a:1", "the last turn is the user's")
    ledger.drop("no answer", "a:2")
    assert ledger.dropped == {"no answer": 2}
    assert ledger.examples == {"no answer": ["a:1 (the last turn is the user's)", "a:2"]}


def test_as_json() -> None:
    ledger = Ledger(num_rows=1, schemas={"a": "text: text"}, padding_tokens=7)
    ledger.drop("too long", "a:1", num_tokens=4)
    stored = json.loads(json.dumps(ledger.as_dict()))
    assert stored["rows"]["dropped"] == {"too long": 1}
    assert stored["tokens"]["dropped"] == 4
    assert stored["tokens"]["padding"] == 7
    assert stored["examples"] == {"too long": ["a:1"]}
    assert stored["schemas"] == {"a": "text: text"}


def test_it_comes_back_from_a_cache_as_it_was() -> None:
    ledger = Ledger(num_rows=3, num_kept=1, split=1, schemas={"a": "text: text"})
    ledger.lengths[12] += 2
    ledger.drop("too long", "a:1", num_tokens=4)
    ledger.put_aside("held out", "a:2")
    ledger.note("odd", "a:3")
    again = Ledger.from_state(json.loads(json.dumps(ledger.state())))
    assert again == ledger
    assert again.findings() == ledger.findings()
    again.drop("another", "a:4")  # its counters count on
    assert again.dropped["another"] == 1


def test_two_ledgers_in_one() -> None:
    """As if all had been booked in it."""
    one, other, whole = Ledger(), Ledger(), Ledger()
    for number, ledger in ((1, one), (2, one), (3, other), (4, other)):
        for into in (ledger, whole):
            into.num_rows += 1
            into.lengths[number % 3] += 1
            into.drop("broken", f"a.jsonl:{number}", num_tokens=number)
            into.repeat("a", f"a.jsonl:{number}")
            into.schemas[f"source {number}"] = "messages"
    one.add(other)
    assert one == whole
    assert one.examples == {"broken": ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]}
