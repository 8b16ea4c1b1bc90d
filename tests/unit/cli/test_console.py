"""Lines where there is no terminal: figures, and the time that is left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qlora_kit.cli import console
from qlora_kit.cli.console import ConsoleReporter, clock, tells_time_left


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_line_says_what_is_done_and_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    now = iter([100.0, 110.0, 120.0, 125.0, 126.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    reporter = ConsoleReporter(Console(file=written, width=132))
    with reporter.progress("training", 10) as progress:
        progress.update(1, loss="loss 3.0")
        progress.update(1, loss="loss 2.0", tokens="90 tok/s")
        progress.update(1, loss="loss 1.0")
    assert written.getvalue() == (
        "training: 2 of 10  loss 2.0  90 tok/s  1:20 left\ntraining: 3 of 10  loss 1.0  1:01 left\n"
    )


def test_the_first_parts_do_not_say_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.StringIO()
    now = iter([100.0, 116.0, 132.0, 170.0, 171.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    reporter = ConsoleReporter(Console(file=written, width=132))
    with reporter.progress("measuring", 1848) as progress:
        for _ in range(3):
            progress.update(25)
    assert written.getvalue() == (
        "measuring: 25 of 1,848\nmeasuring: 50 of 1,848\nmeasuring: 75 of 1,848  27:35 left\n"
    )


@pytest.mark.parametrize(
    ("seconds", "made", "rest", "told"),
    [(1, 9, 1, False), (6, 1, 99, False), (6, 5, 95, True), (61, 1, 99, True), (6, 0, 0, True)],
)
def test_when_the_rest_can_be_told(seconds: float, made: int, rest: int, told: bool) -> None:
    assert tells_time_left(seconds, made, rest) is told


def test_short_work_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    now = iter([100.0, 100.5, 101.0, 101.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with ConsoleReporter(Console(file=written, width=132)).progress("x", 2) as progress:
        progress.update()
        progress.update()
    assert written.getvalue() == ""


def test_what_was_done_before_says_nothing_about_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    now = iter([100.0, 100.0, 120.0, 121.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with ConsoleReporter(Console(file=written, width=132)).progress("training", 100) as progress:
        progress.begin_at(90)
        progress.update(2)
    assert written.getvalue() == "training: 92 of 100  1:20 left\n"


def test_on_a_terminal_too() -> None:
    written = io.StringIO()
    shown = Console(file=written, width=132, force_terminal=True)
    with ConsoleReporter(shown).progress("training", 100) as progress:
        progress.begin_at(90)
        progress.update(2)
    assert "92/100" in written.getvalue()
