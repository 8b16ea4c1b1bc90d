"""Text of a data set on a terminal."""

from __future__ import annotations

from qlora_kit.report.visible import bracketed, shortened, visible


def test_no_data_steers_a_terminal() -> None:
    every = "".join(map(chr, [*range(0x100), 0x2028, 0x202E, 0x2066, 0xFEFF]))
    shown = visible(every)
    assert not [one for one in shown if ord(one) < 0x20 or 0x7F <= ord(one) < 0xA0]
    assert not set(shown) & {"\u2028", "\u202e", "\u2066", "\ufeff"}
    assert visible("a\r\n\tb\x1b[31m é 漢🙂") == "a␍↵⇥b␛[31m é 漢🙂"


def test_a_short_text_stays_and_a_long_one_keeps_both_ends() -> None:
    assert shortened("x" * 100, 100) == "x" * 100
    assert shortened("a" * 500 + "b" * 500, 100) == ("a" * 50 + " […900 characters…] " + "b" * 50)


def test_what_is_trained_on_stands_in_brackets() -> None:
    assert bracketed([("a", False), ("b", True), ("", True), ("c", False)]) == "a⟦b⟧c"
