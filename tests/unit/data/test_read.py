"""Files as people have them, and what is said where one cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.data.demo import NUM_ROWS
from qlora_kit.data.read import Row, read_rows
from qlora_kit.errors import DataError

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(records: list[object], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, "train")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", lines(ROWS), [1, 2, 3]),
        ("a.jsonl", lines(ROWS).rstrip("\n"), [1, 2, 3]),
        ("a.jsonl", lines(ROWS, "\r\n"), [1, 2, 3]),
        ("a.jsonl", "\n" + lines(ROWS, "\n  \n") + "\n\n", [2, 4, 6]),
        ("a.jsonl", "\ufeff" + lines(ROWS), [1, 2, 3]),
        ("a.json", lines(ROWS), [1, 2, 3]),
        ("a.JSONL", lines(ROWS), [1, 2, 3]),
        ("a.json", json.dumps(ROWS), [1, 2, 3]),
        ("a.json", "\ufeff\n " + json.dumps(ROWS, indent=2), [1, 2, 3]),
        ("a.jsonl", json.dumps(ROWS, indent=2), [1, 2, 3]),
    ],
)
def test_lines_and_lists(tmp_path: Path, name: str, content: str, numbers: list[int]) -> None:
    path = write(tmp_path, name, content)
    assert read_rows(path, "train") == [
        Row(path, number, record) for number, record in zip(numbers, ROWS, strict=True)
    ]


def test_an_origin_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "\n" + lines(ROWS))
    assert read_rows(path, "train")[0].origin == f"{path}:2"


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_only_line_feeds_end_a_line(tmp_path: Path, odd: str) -> None:
    text = f"a{odd}b"
    row = '{"text": "%s"}\n' % (text if odd > "\x1f" else json.dumps(text)[1:-1])
    path = write(tmp_path, "a.jsonl", row)
    assert [row.record for row in read_rows(path, "train")] == [{"text": text}]


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps(ROWS[0], indent=2))
    assert [row.record for row in read_rows(path, "train")] == ROWS[:1]


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffone\r\n\r\ntwo \u2028\n")
    assert read_rows(path, "train") == [Row(path, 1, {"text": "one\n\ntwo \u2028\n"})]


@pytest.mark.parametrize(("max_rows", "count"), [(1, 1), (2, 2), (3, 3), (4, 3), (None, 3)])
def test_max_rows(tmp_path: Path, max_rows: int | None, count: int) -> None:
    for path in (
        write(tmp_path, "a.jsonl", lines(ROWS)),
        write(tmp_path, "a.json", json.dumps(ROWS)),
    ):
        assert len(read_rows(path, "train", max_rows)) == count


def test_what_stands_behind_max_rows_may_be_broken(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines(ROWS[:2]) + "{broken\n")
    assert len(read_rows(path, "train", 2)) == 2
    with pytest.raises(DataError, match=f"{path}:3 is not JSON"):
        read_rows(path, "train", 3)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file(tmp_path: Path, name: str, content: str) -> None:
    assert "holds no rows" in refusal(write(tmp_path, name, content))


def test_an_empty_list(tmp_path: Path) -> None:
    assert "holds no rows" in refusal(write(tmp_path, "a.json", "[]"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(ROWS) + '{"text": ', "a.jsonl:4 is not JSON: Expecting value at column"),
        ("a.jsonl", "plain words", "a.jsonl:1 is not JSON"),
        ("a.jsonl", "plain words", "A file of lines holds one JSON object a line."),
        ("a.jsonl", "{'text': 'one'}", "property name enclosed in double quotes at column 2"),
        ("a.json", '[{"text": "one"},\n {"text": ]', "a.json:2 is not JSON: Expecting value"),
        ("a.json", '[{"text": "one"},\n {"text": ]', "read as one list of objects"),
        ("a.jsonl", "[1]\n[2]", "a.jsonl:2 is not JSON: Extra data"),
        ("a.json", '{\n "text": \n}', "a.json:3 is not JSON: Expecting value"),
        ("a.jsonl", '"one"', "a.jsonl:1 holds a text; each row must be an object"),
        ("a.jsonl", "12", "a.jsonl:1 holds 12; each row"),
        ("a.jsonl", "null", "a.jsonl:1 holds null; each row"),
        ("a.json", '[{"text": "one"}, ["two"]]', "a.json:2 holds a list; each row"),
        ("a.json", '{"data":\n [{"text": "one"}]}\n{}', "a.json:3 is not JSON: Extra data"),
        ("a.jsonl", '{"a": 1, "b": 2, "b": 3}', "a.jsonl:1 cannot be read: an object has the key"),
        ("a.json", '[{"x": {"b": 2, "b": 3}}]', "an object has the key 'b' twice"),
        ("a.jsonl", '{"a": %s}' % ("1" * 5000), "a.jsonl:1 cannot be read: Exceeds the limit"),
        ("a.jsonl", '{"a": ' + "[" * 200000, "a.jsonl:1 is nested too deeply"),
        ("a.json", "[" * 200000, "a.json is nested too deeply"),
        ("a.jsonl", b"\xff\xfe{\x00", "is not UTF-8 text: invalid start byte at byte 0"),
        ("a.txt", "naïve".encode("latin-1"), "is not UTF-8 text"),
        ("a.csv", "text\none", "has the ending .csv; readable are .json, .jsonl, .txt"),
        ("a.parquet", b"PAR1", "has the ending .parquet"),
        ("a", "{}", "has the ending (none)"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert message in refusal(write(tmp_path, name, content))


def test_a_number_that_is_none_is_read(tmp_path: Path) -> None:
    """Python writes NaN into JSON; where it stands for a text, the schema refuses it."""
    (row,) = read_rows(write(tmp_path, "a.jsonl", '{"text": "one", "score": NaN}'), "train")
    assert row.record["text"] == "one"


def test_a_folder(tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder; name a file" in refusal(str(tmp_path))


def test_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", lines(ROWS))
    message = refusal(str(tmp_path / "trian.jsonl"))
    assert f"there is no file {tmp_path / 'trian.jsonl'}; did you mean" in message
    assert str(tmp_path / "train.jsonl") in message
    assert refusal(str(tmp_path / "nothing-like-it.txt")).endswith("nothing-like-it.txt.")
    assert f"nor a folder {tmp_path / 'sub'}" in refusal(str(tmp_path / "sub" / "a.jsonl"))


def test_a_missing_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("rows.jsonl") == (
        f"there is no file rows.jsonl; relative paths start in {tmp_path}."
    )


@pytest.mark.parametrize(
    "path", ["./rows", "data/rows.csv", "ROWS.JSONL", "a/b/c", "~/no-such-file-here"]
)
def test_what_looks_like_a_file_is_not_asked_of_the_hub(path: str) -> None:
    assert "there is no file" in refusal(path)


@pytest.mark.parametrize(
    "path", ["x" * 300 + ".jsonl", "a\0b.jsonl", "x" * 300, "~nobody-of-this-name/x.jsonl"]
)
def test_names_that_the_system_refuses(path: str) -> None:
    message = refusal(path)
    assert "cannot be" in message or "there is no file" in message


def test_a_forbidden_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", lines(ROWS))

    def forbid(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "read_text", forbid)
    assert refusal(path) == f"{path} cannot be read: Permission denied."


def test_the_demo() -> None:
    rows = read_rows("demo/commands", "test", 5)
    assert [row.origin for row in rows] == [f"demo/commands:{number}" for number in range(1, 6)]
    assert len(read_rows("demo/commands", "test")) == NUM_ROWS["test"]
    assert "no built-in data set demo/comands" in refusal("demo/comands")
    with pytest.raises(DataError, match="no split 'dev'"):
        read_rows("demo/commands", "dev")


def test_the_hub_is_asked_last_and_may_be_away() -> None:
    message = refusal("nobody/no-such-set")
    assert "nobody/no-such-set is no local file, and the hub did not give its split" in message
    assert "\n" not in message
