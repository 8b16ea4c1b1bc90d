"""Sums that must hold, and what is shown of them."""

from __future__ import annotations

import json

import pytest

from qlora_kit.data.ledger import END_CUT, TRUNCATED, Ledger


def test_findings_say_how_many_and_where() -> None:
    ledger = Ledger(num_rows=2000, truncated=1, ends_cut=1)
    for number in range(1200):
        ledger.drop("too long", f"a:{number}", 10)
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
    ledger.drop("too long", "a:1", 4)
    ledger.supervised_tokens, ledger.context_tokens, ledger.cut_tokens = 3, 2, 2
    ledger.check_balance()


def test_as_json() -> None:
    ledger = Ledger(num_rows=1)
    ledger.drop("too long", "a:1", 4)
    stored = json.loads(json.dumps(ledger.as_dict()))
    assert stored["rows"]["dropped"] == {"too long": 1}
    assert stored["tokens"]["dropped"] == 4
    assert stored["examples"] == {"too long": ["a:1"]}
