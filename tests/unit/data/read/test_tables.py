"""Tables: .csv and .tsv, Parquet and Arrow, and plain text."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_kit.data.read import BadRow, Row, read_source
from qlora_kit.data.read.delimited import delimited_rows
from qlora_kit.data.read.plain_text import text_rows
from qlora_kit.data.rows import RowRefused, Unreadable
from qlora_kit.data.schemas import Recogniser
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SourceSpec

from .files import fault, good, lines, outcome, read, refusal, write

CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
NO_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from(",\t"))
def test_fields_come_back_with_their_lines(rows: list[tuple[str, str]], delimiter: str) -> None:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["a", "b"])
    expected = []
    for first, second in rows:
        # The csv module counts a CR within quotes as a line; the line feeds are ours to count.
        first, second = first.replace("\r", ""), second.replace("\r", "")
        number = written.getvalue().count("\n") + 1
        expected.append(Row("a", number, {"a": first, "b": second}))
        writer.writerow([first, second])
    text = written.getvalue()
    pieces = (text[at : at + 5] for at in range(0, len(text), 5))
    assert list(delimited_rows("a", pieces, delimiter)) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "a,b\n1,x\n", [(2, {"a": "1", "b": "x"})]),
        ("a.csv", "a,b\r\n1,x\r\n\r\n2,\r\n", [(2, {"a": "1", "b": "x"}),
         (4, {"a": "2", "b": ""})]),
        ("a.csv", "a,b\r1,x\r2,y", [(2, {"a": "1", "b": "x"}), (3, {"a": "2", "b": "y"})]),
        ("a.csv", '\ufeff"a","b"\n"1, 2","x ""y"""\n', [(2, {"a": "1, 2", "b": 'x "y"'})]),
        ("a.csv", 'a,b\n"1\n2",x\n3,y', [(2, {"a": "1\n2", "b": "x"}), (4, {"a": "3", "b": "y"})]),
        ("a.csv", 'a,b\n5" disk,x', [(2, {"a": '5" disk', "b": "x"})]),
        ("a.csv", "a;b\n1,5;x\n2,5;y", [(2, {"a": "1,5", "b": "x"}), (3, {"a": "2,5", "b": "y"})]),
        ("a.csv", "a\tb\n1\tx\n", [(2, {"a": "1", "b": "x"})]),
        ("a.tsv", "a\tb\n1,5\tx\n", [(2, {"a": "1,5", "b": "x"})]),
        ("a.csv", "text\none, two\n", [(2, "wrong number of fields")]),
        ("a.csv", "text\none; two\n", [(2, {"text": "one; two"})]),
        ("a.csv", "a,b\n1\n2,x,3\n4,y", [(2, "wrong number of fields"),
         (3, "wrong number of fields"), (4, {"a": "4", "b": "y"})]),
        ("a.csv", 'a,b\n"1"2,x\n4,y', [(2, "quotes out of place"), (3, {"a": "4", "b": "y"})]),
        ("a.csv", "a,b\n1\0,x\n4,y", [(2, "a NUL character"), (3, {"a": "4", "b": "y"})]),
        ("a.csv", "a,b\nNaN,null\n", [(2, {"a": "NaN", "b": "null"})]),
        ("a.csv", "sep=;\na;b\n1,5;x\n", [(3, {"a": "1,5", "b": "x"})]),
        ("a.tsv", '\ufeff"SEP=|"\r\na|b\r\n1|"x\n"\r\n2|"y"z\r\n3|z',
         [(3, {"a": "1", "b": "x\n"}), (5, "quotes out of place"), (6, {"a": "3", "b": "z"})]),
        ("a.csv", ",text\n0,one\n,two\n", [(2, {"Unnamed: 0": "0", "text": "one"}),
         (3, {"text": "two"})]),
        ("a.csv", ",Unnamed: 0\n0,1\n", [(2, {"Unnamed: 0.": "0", "Unnamed: 0": "1"})]),
        ("a.csv", "a,b,\n1,x,\n2,,note\n", [(2, {"a": "1", "b": "x"}),
         (3, {"a": "2", "b": "", "Unnamed: 2": "note"})]),
        ("a.csv", " a , b c \n1, x\n", [(2, {"a": "1", "b c": "x"})]),
        ("a.csv", 'a, b\n1, "x, y"\n', [(2, {"a": "1", "b": "x, y"})]),
        ("a.csv", "a ,b\n1, x\n", [(2, {"a": "1", "b": " x"})]),
        ("a.csv", "a,b\n1,x\n\ufeffa,b\n2,y", [(2, {"a": "1", "b": "x"}), (3, "the header again"),
         (4, {"a": "2", "b": "y"})]),
    ],
)  # fmt: skip
def test_delimited(tmp_path: Path, name: str, content: str, expected: list[Any]) -> None:
    assert outcome(write(tmp_path, name, content)) == expected
    assert outcome(write(tmp_path, f"{name}.gz", gzip.compress(content.encode()))) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,a\n1,2,3", "a.csv:1 names the column 'a' 2 times"),
        ("\n,\n0,one", "a.csv:2 has a header without names"),
        (" a,a\n1,2", "a.csv:1 names the column 'a' 2 times"),
        ('sep=;\na;b\n1;"2', "a.csv:3 opens a quote that is never closed"),
        ('a,b\n1,x\n"2,y\n3,z\n', "a.csv:3 opens a quote that is never closed"),
        ('a,"b\n1,x', "a.csv:1 opens a quote that is never closed"),
        ("a;b\n1\n2\n3\n4", "has no commas in its header, but semicolons"),
        ("a,b\n", "holds no rows"),
        ("\n\n", "holds nothing but white space"),
        ('{"a": 1}\n{"a": 2}', "begins with a JSON object; set format: jsonl"),
    ],
)
def test_a_table_at_fault(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(write(tmp_path, "a.csv", content))


def test_a_large_field(tmp_path: Path) -> None:
    text = "x" * 1_000_000
    assert good(write(tmp_path, "a.csv", f"a,b\n1,{text}\n")) == [{"a": "1", "b": text}]
    with pytest.raises(DataError, match="a:2 has more than 50 characters"):
        list(delimited_rows("a", iter(["a,b\n", "1," + "x" * 100]), ",", limit=50))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("file", [(1, "\n one\ntwo\n \n\nthree \u2028\n")]),
        ("paragraph", [(2, " one\ntwo"), (6, "three \u2028")]),
        ("line", [(2, " one"), (3, "two"), (6, "three \u2028")]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text(tmp_path: Path, rows: str, expected: list[tuple[int, str]], end: str) -> None:
    content = "\n one\ntwo\n \n\nthree \u2028\n".replace("\n", end)
    found = outcome(write(tmp_path, "a.txt", content), text_rows=rows)
    assert found == [(number, {"text": text}) for number, text in expected]


def test_text_at_fault(tmp_path: Path) -> None:
    assert "nothing but white space" in refusal(write(tmp_path, "a.txt", " \n\t\n"))
    assert outcome(write(tmp_path, "a.txt", "a\0b")) == [(1, "a NUL character")]
    with pytest.raises(DataError, match="a:1 begins a text of more than 9 characters"):
        list(text_rows("a", iter(["12345\n", "67890\n"]), "file", limit=9))
    assert len(list(text_rows("a", iter(["12345\n", "67890\n"]), "line", limit=9))) == 2


def save(path: Path, table: pa.Table, form: str) -> Path:
    if form == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif form == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        kind = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with kind(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


FORMS = ["parquet", "file", "stream", "feather"]
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


@given(
    st.lists(st.fixed_dictionaries({"a": TEXTS, "b": st.lists(TEXTS, max_size=3)}), min_size=1),
    st.sampled_from(FORMS),
)
@NO_FIXTURE
def test_columns_come_back(tmp_path: Path, records: list[dict[str, Any]], form: str) -> None:
    schema = pa.schema({"a": pa.large_string(), "b": pa.list_(pa.string())})
    path = save(tmp_path / "a.arrow", pa.Table.from_pylist(records, schema), form)
    assert outcome(path) == list(enumerate(records, start=1))


@pytest.mark.parametrize("form", FORMS)
def test_arrow_values_become_plain(tmp_path: Path, form: str) -> None:
    moment = datetime.datetime(2024, 5, 17, 12, 30, tzinfo=datetime.timezone.utc)
    records = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "tool", "name": "f"}],
            "when": moment,
            "day": moment.date(),
            "price": decimal.Decimal("1.50"),
            "kind": "x",
            "score": 0.5,
        },
        {"kind": "y", "messages": [{"role": "user", "content": "ho"}]},
    ]
    table = pa.Table.from_pylist(records)
    kinds = table.column("kind").dictionary_encode()
    table = table.set_column(table.schema.get_field_index("kind"), "kind", kinds)
    first, second = good(save(tmp_path / "a.parquet", table, form))
    assert first == {
        **records[0],
        "when": "2024-05-17T12:30:00+00:00",
        "day": "2024-05-17",
        "price": "1.50",
    }
    assert second == {**dict.fromkeys(records[0]), **records[1]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\x89PNG", "a binary value"),
        (float("nan"), "NaN or Infinity"),
        (datetime.timedelta(1), "a value that is no text, number or object"),
        ({"inner": [b"x"]}, "a binary value"),
        ({"inner": ["x\0"]}, "a NUL character"),
    ],
)
def test_arrow_values_that_rows_do_not_have(tmp_path: Path, value: object, reason: str) -> None:
    table = pa.table({"n": [1, 2, 3], "odd": pa.array([None, value, None])})
    path = save(tmp_path / "a.parquet", table, "file")
    first, second, third = good(path)
    assert (first, third) == ({"n": 1, "odd": None}, {"n": 3, "odd": None})
    odd = second["odd"]
    assert isinstance(odd, Unreadable)
    assert odd.reason == reason
    assert odd.detail.startswith("column 'odd': ")


def test_a_column_that_cannot_be_read_is_at_fault_only_where_it_is_read(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "thumbnail": [b"x", b"y"]}
    table = pa.table(columns)
    recogniser = Recogniser(SourceSpec(path="a.parquet"))
    [first, _] = read(save(tmp_path / "a.parquet", table, "file"))
    assert isinstance(first, Row)
    assert recogniser.recognise(first).origin == first.origin
    assert recogniser.ignored_keys == ("thumbnail",)
    bad = Row("a.parquet", 3, {**first.record, "completion": Unreadable("a binary value", "1")})
    with pytest.raises(RowRefused, match="a binary value"):
        recogniser.recognise(bad)


def test_a_map_is_an_object(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.int64())
    values = pa.array([[("x", 1), ("y", None)], [("x", 1), ("x", 2)]], kind)
    path = save(tmp_path / "a.parquet", pa.table({"m": values}), "file")
    first, second = good(path)
    assert first == {"m": {"x": 1}}
    assert second["m"].reason == "a key twice"


def test_a_date_that_python_does_not_have(tmp_path: Path) -> None:
    values = pa.array([0, 2**60, 5], pa.int64()).cast(pa.timestamp("us"))
    path = save(tmp_path / "a.arrow", pa.table({"t": values}), "file")
    assert [type(row) for row in read(path)] == [Row, BadRow, Row]


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.arrow", "a"])
@pytest.mark.parametrize("form", FORMS)
def test_tables_are_told_by_their_content(tmp_path: Path, name: str, form: str) -> None:
    path = save(tmp_path / name, pa.table({"a": ["x"]}), form)
    assert good(path) == [{"a": "x"}]
    assert good(write(tmp_path, "b.gz", gzip.compress(path.read_bytes()))) == [{"a": "x"}]
    assert "format: csv cannot read it" in refusal(path, format="csv")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_table_cut_off(tmp_path: Path, form: str, share: float) -> None:
    table = pa.table({"a": [str(number) * 50 for number in range(2000)]})
    content = save(tmp_path / "whole", table, form).read_bytes()
    path = write(tmp_path, "a.parquet", content[: int(share * len(content))])
    assert f"{path} is damaged or cut off" in refusal(path)


@given(st.integers(8, 2**20), st.binary(min_size=1, max_size=8), st.sampled_from(FORMS))
@NO_FIXTURE
def test_damage_is_no_crash(tmp_path: Path, at: int, damage: bytes, form: str) -> None:
    table = pa.table({"a": ["one", "two"], "b": [["x"], ["y", "z"]]})
    content = bytearray(save(tmp_path / "whole", table, form).read_bytes())
    at %= len(content) - len(damage)
    content[at : at + len(damage)] = damage
    told = fault(write(tmp_path, "a.parquet", bytes(content)))
    assert told is None or "a.parquet" in told


def test_a_column_named_twice(tmp_path: Path) -> None:
    table = pa.table([["x"], ["y"]], names=["a", "a"])
    path = save(tmp_path / "a.arrow", table, "file")
    assert "has more than one column 'a'" in refusal(path)


def test_what_is_no_table(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines([{"a": 1}]))
    assert "is no parquet file by its first bytes" in refusal(path, format="parquet")
    assert "begins with a JSON object" in refusal(write(tmp_path, "a.parquet", lines([{"a": 1}])))
    assert "is no arrow file by its first bytes" in refusal(write(tmp_path, "a.arrow", "words"))
    assert "is damaged or cut off" in refusal(write(tmp_path, "a.parquet", b"PAR1"))
    assert "is damaged or cut off" in refusal(write(tmp_path, "a.arrow", b"ARROW1\0\0"))


def test_rows_that_a_stray_quote_swallows_are_counted(tmp_path: Path) -> None:
    lines = ["a,b", *(f"p{number},c{number}" for number in range(2, 21))]
    lines[4] = 'p5,"c5'
    lines[12] = 'p13,"c13'
    found = list(read_source(SourceSpec(path=str(write(tmp_path, "a.csv", "\n".join(lines))))))
    bad = [one for one in found if isinstance(one, BadRow)]
    assert len(found) == 19
    assert [one.number for one in bad] == list(range(5, 14))
    assert {one.reason for one in bad} == {"quotes out of place"}
    assert "lines 5 to 13" in bad[0].detail


@pytest.mark.parametrize("packed", [False, True])
def test_a_page_of_a_table_may_carry_a_checksum(tmp_path: Path, packed: bool) -> None:
    """Without one, a damaged text is as good as another."""
    table = pa.table({"a": ["one of them", "two of them"]})
    path = tmp_path / "a.parquet"
    pq.write_table(
        table, path, compression="none", write_page_checksum=packed, use_dictionary=False
    )
    content = path.read_bytes().replace(b"\x0b\0\0\0one of", b"\x0b\0\0\0six of")
    told = fault(write(tmp_path, "b.parquet", content))
    assert ("damaged" in told if told else False) is packed
