"""JSON Lines and JSON values: what is a row, what is a bad one, and what stops the file."""

from __future__ import annotations

import gzip
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data.read import BadRow, Row
from qlora_kit.data.read.json_rows import holds_lines, json_lines, json_value
from qlora_kit.errors import DataError

from .files import ROWS, fault, good, lines, outcome, read, refusal, write

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), min_size=1, max_size=6)
BLANKS = st.sampled_from(["", "\n", " \n", "\r\n", "\n\n\t\n"])


def pieces(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


@given(RECORDS, st.data(), st.integers(1, 30), st.booleans())
def test_lines_give_back_every_record(
    records: list[dict[str, Any]], data: st.DataObject, size: int, escaped: bool
) -> None:
    text, expected = "", []
    for record in records:
        text += data.draw(BLANKS)
        expected.append(Row("a", text.count("\n") + 1, record))
        end = data.draw(st.sampled_from(["\n", "\r\n"]))
        text += json.dumps(record, ensure_ascii=escaped) + end
    assert list(json_lines("a", pieces(text, size))) == expected


@given(RECORDS, st.integers(1, 30), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_list_gives_back_every_record(
    records: list[dict[str, Any]], size: int, indent: int | None, escaped: bool
) -> None:
    text = json.dumps(records, indent=indent, ensure_ascii=escaped)
    expected = [Row("a", number, record) for number, record in enumerate(records, start=1)]
    assert list(json_value("a", pieces(text, size))) == expected
    wrapped = json.dumps({"version": 1.5, "data": records, "more": ["x"]}, indent=indent)
    assert list(json_value("a", pieces(wrapped, size))) == expected


@given(RECORDS, st.sampled_from(["jsonl", "json"]), st.sampled_from(["", "gz", "gz2", "zst"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_files_give_back_every_record(
    tmp_path: Path, records: list[dict[str, Any]], form: str, packed: str
) -> None:
    records = [{"text": "first"}, *records]  # an object of one list would be a wrapper
    text = (lines(records) if form == "jsonl" else json.dumps(records)).encode("utf-8")
    middle = len(text) // 2
    content = {
        "": text,
        "gz": gzip.compress(text),
        "gz2": gzip.compress(text[:middle]) + gzip.compress(text[middle:]),
        "zst": pa.compress(text, "zstd", asbytes=True),
    }[packed]
    path = write(tmp_path, f"a.{form}", content)
    assert read(path) == [Row(path, n, record) for n, record in enumerate(records, start=1)]


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_are_a_traceback(tmp_path: Path, content: bytes) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"):
        path = write(tmp_path, name, content)
        told = fault(path)
        assert told is None or path in told


@given(st.text('[]{}",:1 \n\\truefalsn', max_size=60), st.integers(1, 9))
def test_a_value_is_read_alike_however_it_is_cut(text: str, size: int) -> None:
    def told(size: int) -> tuple[list[Any], str]:
        rows = []
        try:
            for row in json_value("a", pieces(text, size)):
                rows.append(row)
        except DataError as error:
            return rows, str(error)
        return rows, ""

    assert told(size) == told(1000)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", lines(ROWS), [1, 2, 3]),
        ("a.jsonl", lines(ROWS).rstrip("\n"), [1, 2, 3]),
        ("a.jsonl", lines(ROWS, "\r\n"), [1, 2, 3]),
        ("a.jsonl", "\n" + lines(ROWS, "\n  \n") + "\n\n", [2, 4, 6]),
        ("a.jsonl", "\ufeff" + lines(ROWS), [1, 2, 3]),
        ("a.ndjson", lines(ROWS), [1, 2, 3]),
        ("a.jsonl", lines(ROWS, "\r"), [1, 2, 3]),
        ("a.json", lines(ROWS, "\r"), [1, 2, 3]),
        ("a.jsonl", "\ufeff\ufeff" + "\ufeff".join(lines([row]) for row in ROWS), [1, 2, 3]),
        ("a.json", "\ufeff\ufeff" + json.dumps(ROWS), [1, 2, 3]),
        ("a.json", lines(ROWS), [1, 2, 3]),
        ("a.json", "\n" + lines(ROWS, "\n\n"), [2, 4, 6]),
        ("a.JSONL", lines(ROWS), [1, 2, 3]),
        ("a.json", json.dumps(ROWS), [1, 2, 3]),
        ("a.json", "\ufeff\n " + json.dumps(ROWS, indent=2), [1, 2, 3]),
        ("a.jsonl", json.dumps(ROWS, indent=2), [1, 2, 3]),
        ("a.jsonl", json.dumps(ROWS), [1, 2, 3]),
        ("a.json", json.dumps({"data": ROWS}), [1, 2, 3]),
        ("a.json", json.dumps({"data": ROWS}, indent=1), [1, 2, 3]),
        ("a.json", json.dumps({"version": "1", "rows": ROWS, "n": 3}, indent=1), [1, 2, 3]),
        ("a", json.dumps(ROWS), [1, 2, 3]),
        ("rows.dat", lines(ROWS), [1, 2, 3]),
    ],
)
def test_lines_lists_and_wrappers(
    tmp_path: Path, name: str, content: str, numbers: list[int]
) -> None:
    path = write(tmp_path, name, content)
    assert outcome(path) == list(zip(numbers, ROWS, strict=True))


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r"])
def test_only_line_feeds_end_a_line(tmp_path: Path, odd: str) -> None:
    text = f"a{odd}b"
    row = '{"text": "%s"}\n' % (text if odd > "\x1f" else json.dumps(text)[1:-1])
    assert good(write(tmp_path, "a.jsonl", row)) == [{"text": text}]
    spaced = '{"text":\r"a"}\n{"text": "b"}\n'
    assert outcome(write(tmp_path, "a.jsonl", spaced)) == [(1, {"text": "a"}), (2, {"text": "b"})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "record",
    [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"conversations": [{"from": "human", "value": "hi"}], "id": 1},
        {"chat": [{"role": "user", "content": "hi"}]},
        {"prompt": "p", "tools": [{"name": "f"}]},
        {"words": ["a", "b"]},
    ],
)
def test_one_object_is_one_row(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    assert outcome(write(tmp_path, name, json.dumps(record, indent=2))) == [(1, record)]
    assert outcome(write(tmp_path, name, json.dumps(record))) == [(1, record)]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("{'text': 'a'}", "not JSON", "column 2"),
        ('{"text": }', "not JSON", "Expecting value at column 10"),
        ('{"text": "a"} x', "not JSON", "Extra data"),
        ("plain words", "not JSON", "Expecting value at column 1; it begins with 'plain words"),
        ('{"a": 1},', "not JSON", "column 9; a comma stands behind the object"),
        ('{"a": 1,}', "not JSON", "column 9; the comma before } is one too many"),
        ('{"a": [1, ]}', "not JSON", "column 11; the comma before ] is one too many"),
        ('{"a": 1}{"a": 2}', "not JSON", "column 9; another begins there"),
        ('{"a": None}', "not JSON", "column 7; it is true, false or null in JSON"),
        ('{"a": 1} # one', "not JSON", "JSON has no comments"),
        ("\0\0\0", "not JSON", "NUL characters stand there"),
        ('{"a": "x\ty"}', "not JSON", "control character at column 9; within a text"),
        ('{"a": "\x00"}', "not JSON", "NUL characters stand there"),
        ('{"a": ["\\u0000"]}', "a NUL character", "in '\\x00'"),
        ('{"a\\u0000": 1}', "a NUL character", "in 'a\\x00'"),
        (json.dumps('{"a": 1}'), "not an object", "it was made JSON twice"),
        ("[1]", "not an object", "found a list"),
        ('"one"', "not an object", "the text 'one'"),
        ("null", "not an object", "found null"),
        ('{"a": {"b": 1, "b": 2}}', "a key twice", "'b'"),
        ('{"a": NaN}', "NaN or Infinity", "NaN"),
        ('{"a": -Infinity}', "NaN or Infinity", "-Infinity"),
        ('{"a": %s}' % ("1" * 5000), "a number out of range", "5000 digits"),
        ('{"a": 1e999}', "a number out of range", "1e999"),
        ('{"a": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply", "100 levels"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply", "100 levels"),
        ('{"a": ' * 100_000, "nested too deeply", "100 levels"),
    ],
)
def test_a_bad_line_is_one_bad_row(tmp_path: Path, line: str, reason: str, detail: str) -> None:
    path = write(tmp_path, "a.jsonl", f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n')
    first, bad, last = read(path)
    assert isinstance(bad, BadRow)
    assert (bad.origin, bad.reason) == (f"{path}:3", reason)
    assert detail in bad.detail
    assert [row.number for row in (first, last)] == [1, 4]
    assert isinstance(last, Row)


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ('{"b": 1, "b": 2}', "a key twice"),
        ('{"b": NaN}', "NaN or Infinity"),
        ('{"b": %s}' % ("1" * 5000), "a number out of range"),
        ('{"b": %s}' % ("[" * 150 + "]" * 150), "nested too deeply"),
        ('["x"]', "not an object"),
        ('{"b": {"c": "\\u0000"}}', "a NUL character"),
        ("12", "not an object"),
        ("null", "not an object"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_bad_element_is_one_bad_row(element: str, reason: str, size: int) -> None:
    text = f'[{{"a": 1}},\n {element},\n {{"a": 2}}]'
    first, bad, last = json_value("a", pieces(text, size))
    assert isinstance(bad, BadRow)
    assert (bad.number, bad.reason) == (2, reason)
    assert bad.detail.startswith("line 2: ")
    assert (first, last) == (Row("a", 1, {"a": 1}), Row("a", 3, {"a": 2}))


def test_the_last_line_may_be_cut_off(tmp_path: Path) -> None:
    *_, bad = read(write(tmp_path, "a.jsonl", lines(ROWS) + '{"text": "fo'))
    assert isinstance(bad, BadRow)
    assert "may be cut off" in bad.detail


def test_what_only_looks_like_an_escape_is_text(tmp_path: Path) -> None:
    record = {"text": "\\u0000 is how JSON writes NUL"}
    assert good(write(tmp_path, "a.jsonl", lines([record]))) == [record]
    assert good(write(tmp_path, "a.json", json.dumps([record]))) == [record]


def test_a_list_of_conversations_may_have_the_name_of_one(tmp_path: Path) -> None:
    records = [{"messages": [{"role": "user", "content": text}]} for text in "ab"]
    assert good(write(tmp_path, "a.json", json.dumps({"conversations": records}))) == records


def test_brackets_in_text_are_no_nesting(tmp_path: Path) -> None:
    record = {"text": "[{" * 500}
    assert good(write(tmp_path, "a.jsonl", lines([record]))) == [record]
    assert good(write(tmp_path, "a.json", json.dumps([record]))) == [record]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "one"},\n {"text": ]', "a.json:2 cannot be read: it is not JSON: Expecting v"),
        ('[{"text": "one"},\n {"text": "two"\n', "a.json:3 cannot be read: the file ends within"),
        ('[{"text": "one"},\n {"text": "two', "a.json:2 cannot be read: the file ends within the"),
        ('[{"text": "one"},\n', "a.json:2 cannot be read: the file ends within"),
        ('[\n{"a": 1}\n{"a": 2}]', "a.json:3 cannot be read: , or ] is expected, found '{'"),
        ('[{"a": 1},\n]', "a.json:2 cannot be read: a comma stands before ]. Remove it"),
        (
            '[{"a": [1,]}]',
            "a.json:1 cannot be read: it is not JSON: Expecting value; the comma before",
        ),
        ("[{'a': 1}]", "double quotes; texts stand in double quotes, and this may be what Python"),
        ('[{"a": True}]', "Expecting value; it is true, false or null in JSON"),
        (
            '[\n// all\n{"a": 1}]',
            "a.json:2 cannot be read: it is not JSON: Expecting value; JSON has",
        ),
        ('[{"a": "x\ny"}]', "Invalid control character; within a text, a line feed is written"),
        ('/* all */ [{"a": 1}]', "neither [ nor { begins it, but '/* all */ [{"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}', "a.json:4 cannot be read: another value begins behind"),
        ('{"a": {"0": 1, "1": 2}, "b": {"0": 3, "1": 4}}', "it holds columns, not rows"),
        ('{"a": ["x", "y"], "b": [1, 2]}', "it holds columns, not rows"),
        ('[{"a": 1}] x', "something stands behind its end"),
        ('{\n "text": \n}', "a.json:3 cannot be read: it is not JSON: Expecting value"),
        ('{"a": 1,\n}', "a.json:2 cannot be read: a comma stands before }"),
        ('{"data":\n [{"a": 1}]}\n}', "a.json:3 cannot be read: something stands behind"),
        ('{"a": [{"b": 1}],\n"c": [{"d": 1}]}', "two lists of objects, 'a' and 'c'"),
        ("plain words", "neither [ nor { begins it"),
        ('"one"', "neither [ nor { begins it"),
        ("[" * 200_000, "a.json:1 cannot be read: it is nested too deeply"),
        ("[]", "holds no rows"),
        ('{"data": []}', "holds no rows"),
        (" \n ", "holds nothing but white space"),
        ("\ufeff", "holds no rows"),
    ],
)
def test_what_stops_a_file_that_is_one_value(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(write(tmp_path, "a.json", content))


@pytest.mark.parametrize(
    ("text", "by_json", "by_jsonl"),
    [
        ('{"a": 1}\n{"a": 2}', True, True),
        ('{"a": 1}\nbroken', True, True),
        ('{"a": broken}\n{"a": 1}', True, True),
        ('{"a": "cut\n{"a": 1}', True, True),
        ('{"a": 1}', False, True),
        ('{"a": [\n1]}', False, True),
        ('{\n"a": 1}', False, False),
        ('{"a": 1\n, "b": 2}', False, True),
        ('{"a": {"b": 1}\n}', False, True),
        ("[1]\n[2]", True, True),
        ('[{"a": 1},\n{"a": 2}]', False, False),
        ('[{"a": 1}]\n', False, False),
        ("[", False, False),
    ],
)
@pytest.mark.parametrize("size", [1, 100])
def test_lines_are_told_from_values(text: str, by_json: bool, by_jsonl: bool, size: int) -> None:
    assert holds_lines(pieces(text, size), is_named_so=False) == by_json
    assert holds_lines(pieces(text, size), is_named_so=True) == by_jsonl


def test_the_format_can_be_said(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", lines(ROWS))
    assert "set format: jsonl" in refusal(path)
    assert good(path, format="jsonl") == ROWS
    assert good(path, format="text") == [{"text": lines(ROWS)}]
    assert "for one object a line set format: jsonl" in refusal(path, format="json")


def test_a_line_over_the_limit_is_one_bad_row() -> None:
    text = lines([{"a": 1}, {"a": "x" * 100}, {"a": 2}])
    for size in (1, 7, 1000):
        rows = list(json_lines("a", pieces(text, size), limit=50))
        if size == 1000:  # in hand already
            continue
        assert [type(row) for row in rows] == [Row, BadRow, Row]
        assert rows[1] == BadRow("a", 2, "row too long", "more than 50 characters")
    with pytest.raises(DataError, match="more than 50 characters"):
        list(json_value("a", pieces(json.dumps([{"a": "x" * 1000}]), 7), limit=50))


def test_a_long_element_is_not_read_often(tmp_path: Path) -> None:
    """Twice as long takes twice as long, not four times: by what is copied, not by a clock."""
    taken = 0

    def counted(text: str) -> Iterator[str]:
        nonlocal taken
        for piece in pieces(text, 1000):
            taken += 1
            yield piece

    record = {"text": "x" * 3_000_000}
    rows = list(json_value("a", counted(json.dumps([record]))))
    assert rows == [Row("a", 1, record)]
    assert taken == 3001


GROWTH = """
import resource, sys
from qlora_kit.data.read import read_source
from qlora_kit.recipe.data import SourceSpec
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
num_rows = sum(1 for _ in read_source(SourceSpec(path=sys.argv[1])))
print(num_rows, peak() - before)
"""


def growth(path: Path) -> tuple[int, int]:
    """How many rows a file has, and how many bytes reading them takes at its peak."""
    run = [sys.executable, "-c", GROWTH, str(path)]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    num_rows, num_bytes = done.stdout.split()
    return int(num_rows), int(num_bytes)


def write_large(folder: Path, name: str, num_bytes: int) -> tuple[Path, int]:
    path = folder / name
    row = json.dumps({"text": "x" * 960, "number": 1}) + ("," if name == "a.json" else "") + "\n"
    num_rows = num_bytes // len(row)
    with path.open("w") as file:
        file.write("[" if name == "a.json" else "")
        for _ in range(num_rows):
            file.write(row)
        file.write("{}]" if name == "a.json" else "{}\n")
    return path, num_rows + 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    path, num_rows = write_large(tmp_path, name, 60_000_000)
    found, num_bytes = growth(path)
    assert found == num_rows
    assert num_bytes < 30_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_memory_of_a_large_file(tmp_path: Path, name: str) -> None:
    path, num_rows = write_large(tmp_path, name, 300_000_000)
    found, num_bytes = growth(path)
    assert found == num_rows
    assert num_bytes < 150_000_000


def test_a_field_of_a_hundred_megabytes(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = json.dumps([{"text": "x" * 100_000_000}, {"text": "y"}])
    records = good(write(tmp_path, "a.json", content))
    assert [len(record["text"]) for record in records] == [100_000_000, 1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000


@pytest.mark.parametrize("size", range(1, 20))
def test_a_number_that_the_end_of_a_piece_cuts(size: int) -> None:
    text = '{"version": 12.5e-3, "n": -10, "data": [{"a": 1}]}'
    assert list(json_value("a", pieces(text, size))) == [Row("a", 1, {"a": 1})]
