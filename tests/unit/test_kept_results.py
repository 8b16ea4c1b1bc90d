"""Small results in the cache: taken back as they were, or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlora_kit.kept import keep, key_of, recall


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_kept_is_recalled_by_its_key_alone() -> None:
    values = {"found": [1, 2], "why": None}
    keep("trials", "a", values)
    assert recall("trials", "a") == values
    assert recall("trials", "b") is None
    assert recall("others", "a") is None


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_one_byte_that_changed_makes_it_unknown(cache: Path, place: int) -> None:
    keep("trials", "a", {"found": "x" * 100})
    path = cache / "trials" / "a.json"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert recall("trials", "a") is None


def test_an_empty_file_is_unknown(cache: Path) -> None:
    keep("trials", "a", {"found": 1})
    (cache / "trials" / "a.json").write_bytes(b"")
    assert recall("trials", "a") is None


def test_what_nobody_asked_for_in_a_month_goes(cache: Path) -> None:
    before = time.time() - 40 * 24 * 3600
    for name in ("asked", "forgotten"):
        keep("trials", name, {"found": name})
    for path in (cache / "trials").iterdir():
        os.utime(path, (before, before))
    recall("trials", "asked")
    keep("trials", "new", {"found": 1})
    assert sorted(one.name for one in (cache / "trials").iterdir()) == ["asked.json", "new.json"]


def test_a_cache_that_cannot_be_written_is_no_fault(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    keep("trials", "a", {"found": 1})
    assert recall("trials", "a") is None


def test_a_key_is_of_all_facts_in_any_order() -> None:
    facts = {"b": {"y", "x", "z"}, "a": (1, 2)}
    assert key_of(facts) == key_of(dict(sorted(facts.items())))
    assert key_of(facts) != key_of({**facts, "a": (1, 3)})
    assert key_of(facts) != key_of({**facts, "b": {"y", "x"}})
