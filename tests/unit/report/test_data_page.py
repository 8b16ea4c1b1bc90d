"""The page of a preview: whole, inert, and with everything in it."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from qlora_kit.data.ledger import Ledger
from qlora_kit.data.pieces import Piece, Shown
from qlora_kit.data.preview import PartView, Preview, measure_lengths, measure_packing
from qlora_kit.report.data_page import page

HOSTILE = "</div><script>alert(1)</script><img src=http://a.b/c onerror='x'>\x1b[31m\x00\u202e&amp;"
VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text; asserts that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def preview(text: str = "fine", max_length: int = 50) -> Preview:
    ledger = Ledger(num_rows=3, num_kept=2, num_sequences=2, schemas={f"{text}.jsonl": text})
    ledger.drop(text, f"{text}:3", text, num_tokens=4)
    ledger.supervised_tokens, ledger.rendered_tokens = 5, 9
    pieces = (
        Piece("<|im_start|>", (1,), False, True),
        Piece(text, (7, 8), True, False),
        Piece("line\n", (9,), True, False),
    )
    example = Shown(f"{text}:1", (text,), pieces, 4, 3)
    part = PartView("train", ledger, measure_lengths({3: 1, 60: 2}, max_length), text)
    packing = measure_packing(np.array([3, 6]), 10, 2, "random", 0)
    return Preview(f"{text}.yaml", (part,), packing, False, (example,))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("text", ["fine", HOSTILE])
def test_nothing_of_the_data_becomes_markup(text: str) -> None:
    plain, found = read(page(preview())), read(page(preview(text)))
    assert found.tags == plain.tags
    assert "script" not in found.tags
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "onerror", "onclick", "srcset", "data", "action"}
    assert not re.search(r"url\(|@import", page(preview(text)))
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in found.attributes
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page(preview(text)))


def test_everything_is_on_it() -> None:
    shown = page(preview())
    text = " ".join(read(shown).text)
    for part in (
        "fine.yaml",
        "fine.jsonl",
        "dropped: fine",
        "1 of 3 rows: dropped, fine (fine:3 (fine))",
        "supervised (the model learns to write them)",
        "max_length 50: 2 rows longer",
        "the longest has 60",
        "padded to the longest of each batch",
        "fine:1: 4 tokens, 3 of them supervised",
    ):
        assert part in text, part
    assert '<span class="learned" title="7 8">fine</span>' in shown
    assert '<span class="special" title="1">&lt;|im_start|&gt;</span>' in shown
    assert '<span class="learned" title="9">line↵\n</span>' in shown
    assert "prefers-color-scheme: dark" in shown


def test_bars_beyond_max_length_look_different() -> None:
    assert page(preview(max_length=50)).count('class="bar beyond"') == 2
    inside = page(preview(max_length=60))
    assert 'class="bar beyond"' not in inside
    assert "max_length 60: no row longer" in inside


def test_a_part_without_rendered_rows_has_a_page() -> None:
    ledger = Ledger(num_rows=1)
    ledger.drop("not JSON", "a:1")
    part = PartView("train", ledger, None, "nothing to train on")
    text = " ".join(read(page(Preview("a", (part,), None, False, ()))).text)
    assert "nothing to train on" in text
    assert "Examples" not in text
