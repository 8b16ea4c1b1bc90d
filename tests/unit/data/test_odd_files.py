"""Odd and damaged files as they are met with, from the file to rows with a meaning.

Each has an outcome: how many rows are used, which are dropped and why, or what the refusal says.
What single readers do with single bytes is tested beside them.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from qlora_kit.data.prepare import read_examples
from qlora_kit.data.read import BadRow, files_left_out, read_source
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import Recogniser
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SourceSpec

Content = str | bytes | Callable[[Path], None]

PLAIN = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(3)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }
    for number in range(3)
]


def lines(records: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records)


def table(**columns: Any) -> Content:
    """A Parquet file of these columns beside a prompt and a completion."""
    made = pa.table({"prompt": ["q", "r"], "completion": ["a", "b"]} | columns)
    return lambda path: pq.write_table(made, path)


def stream(path: Path) -> None:
    """As `datasets` saves its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.Table.from_pylist(PLAIN)
    with pa.ipc.new_stream(str(path), made.schema) as writer:
        writer.write_table(made)


def folder(files: dict[str, Content]) -> Content:
    def build(path: Path) -> None:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            put(path / name, content)

    return build


def put(path: Path, content: Content) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rewrite(path: Path, content: Content, change: Callable[[bytes], bytes]) -> None:
    put(path, content)
    path.write_bytes(change(path.read_bytes()))


def feather(path: Path) -> None:
    pyarrow.feather.write_feather(pa.Table.from_pylist(PLAIN), str(path))


def excel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


def outcome(path: Path, **fields: Any) -> tuple[int, list[tuple[int, str, str]]]:
    """How many rows mean something, and of the others the number, the reason and the detail."""
    spec = SourceSpec(path=str(path), **fields)
    recogniser = Recogniser(spec)
    num_used, dropped = 0, []
    for row in read_source(spec):
        if isinstance(row, BadRow):
            dropped.append((row.number, row.reason, row.detail))
            continue
        try:
            recogniser.recognise(row)
        except RowRefused as refused:
            dropped.append((row.number, refused.reason, refused.detail))
        else:
            num_used += 1
    return num_used, dropped


COLUMNS = "prompt,completion\n"

USED: dict[str, tuple[str, Content, int]] = {
    "an array in a .jsonl": ("a.jsonl", json.dumps(PLAIN, indent=2), 3),
    "lines in a .json": ("a.json", lines(PLAIN), 3),
    "a wrapper with other keys": ("a.json", json.dumps({"v": 1, "rows": CHATS, "n": {}}), 3),
    "a wrapper called as a row's key": ("a.json", json.dumps({"messages": CHATS}), 3),
    "one conversation in a .json": ("a.json", json.dumps(CHATS[0], indent=1), 1),
    "files with marks joined": ("a.jsonl", "".join("\ufeff" + lines([one]) for one in PLAIN), 3),
    "UTF-16 with a mark": ("a.jsonl", lines(PLAIN).encode("utf-16"), 3),
    "CR alone ends lines": ("a.jsonl", lines(PLAIN, "\r"), 3),
    "separators within texts": (
        "a.jsonl",
        lines([{"prompt": "a\u2028b\x85c", "completion": "d\u2029e\x0c"}]),
        1,
    ),
    "blank lines": ("a.jsonl", "\n\n" + lines(PLAIN, "\r\n \t\r\n"), 3),
    "gzip under a plain name": ("a.jsonl", gzip.compress(lines(PLAIN).encode()), 3),
    "a plain file under gzip's name": ("a.json.gz", lines(PLAIN), 3),
    "gzip padded with zeros": ("a.jsonl.gz", gzip.compress(lines(PLAIN).encode()) + bytes(512), 3),
    "no ending": ("rows", lines(PLAIN), 3),
    "sep= of Excel": ("a.csv", "\ufeffsep=;\r\nprompt;completion\r\nq;a\r\n", 1),
    "the index of pandas": ("a.csv", ",prompt,completion\n0,q,a\n1,r,b\n", 2),
    "empty columns at the end": ("a.csv", "prompt,completion,,\nq,a,,\nr,b,,\n", 2),
    "a blank after each comma": ("a.csv", 'prompt, completion\nq, "a, b"\n', 1),
    "a conversation in a field": (
        "a.csv",
        'messages\n"' + json.dumps(CHATS[0]["messages"]).replace('"', '""') + '"\n',
        1,
    ),
    "twenty thousand columns": (
        "a.csv",
        ",".join(f"c{number}" for number in range(20_000)) + f",{COLUMNS}{'1,' * 20_000}q,a\n",
        1,
    ),
    "dictionaries and large texts": (
        "a.parquet",
        table(
            prompt=pa.array(["q", "q"]).dictionary_encode(),
            completion=pa.array(["a", "b"], pa.large_string()),
        ),
        2,
    ),
    "times and maps beside": (
        "a.parquet",
        table(
            t=pa.array([2**62, None], pa.timestamp("ns")),
            m=pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        ),
        2,
    ),
    "Parquet in gzip": (
        "a.parquet.gz",
        lambda path: rewrite(path, table(), gzip.compress),
        2,
    ),
    "a folder that datasets saved": (
        "d",
        folder({"data-0-of-1.arrow": stream, "state.json": "{}", "dataset_info.json": "{}"}),
        3,
    ),
    "a folder of splits that datasets saved": (
        "d",
        folder({"train/data.arrow": stream, "test/data.arrow": stream, "dataset_dict.json": "{}"}),
        3,
    ),
    "what a Mac leaves in a folder": (
        "d",
        folder({"a.jsonl": lines(PLAIN), ".DS_Store": b"\0\0", "._a.json": b"\0\5\26\7"}),
        3,
    ),
    "a folder that is called like a file": ("a.jsonl", folder({"b.jsonl": lines(PLAIN)}), 3),
    "signs of many scripts": (
        "größe [1].jsonl",
        lines([{"prompt": "👩‍👩‍👧 שלום \u202eabc e\u0301", "completion": "مرحبا 🏳️‍🌈"}]),
        1,
    ),
}


@pytest.mark.parametrize(("name", "content", "count"), USED.values(), ids=USED)
def test_is_read(tmp_path: Path, name: str, content: Content, count: int) -> None:
    put(tmp_path / name, content)
    assert outcome(tmp_path / name) == (count, [])
    assert len(list(read_examples([SourceSpec(path=str(tmp_path / name))]))) == count


DROPPED: dict[str, tuple[str, Content, int, list[tuple[int, str, str]]]] = {
    "a comma behind each object": (
        "a.jsonl",
        lines(PLAIN, ",\n"),
        0,
        [(number, "not JSON", "a comma stands behind the object") for number in (1, 2, 3)],
    ),
    "what Python prints": (
        "a.jsonl",
        "".join(f"{one!r}\n" for one in PLAIN),
        0,
        [(number, "not JSON", "what Python prints") for number in (1, 2, 3)],
    ),
    "JSON in JSON": (
        "a.jsonl",
        json.dumps(json.dumps(PLAIN[0])) + "\n" + lines(PLAIN),
        3,
        [(1, "not an object", "it was made JSON twice")],
    ),
    "a comment": ("a.jsonl", "# all\n" + lines(PLAIN), 3, [(1, "not JSON", "has no comments")]),
    "CSV called .jsonl": (
        "a.jsonl",
        f"{COLUMNS}q,a\n",
        0,
        [(1, "not JSON", "begins with 'prompt,completion"), (2, "not JSON", "begins with 'q,a")],
    ),
    "zeros that a crash left": (
        "a.jsonl",
        lines(PLAIN) + "\0" * 4096 + lines(PLAIN[:1]),
        3,
        [(4, "not JSON", "NUL characters stand there")],
    ),
    "a line cut off": (
        "a.jsonl",
        lines(PLAIN)[:-9],
        2,
        [(3, "not JSON", "Unterminated string starting at column")],
    ),
    "NUL and half a pair": (
        "a.jsonl",
        lines(PLAIN)
        + '{"prompt": "a\\u0000b", "completion": "x"}\n{"prompt": "a", "completion": "\\ud800"}\n',
        3,
        [(4, "a NUL character", ""), (5, "half a surrogate pair", "completion")],
    ),
    "numbers that are none": (
        "a.json",
        f'[{json.dumps(PLAIN[0])},\n{{"prompt": "q", "completion": "a", "x": NaN}},\n'
        '{"prompt": "q", "completion": "a", "x": 1e400}]',
        1,
        [(2, "NaN or Infinity", "line 2"), (3, "a number out of range", "line 3")],
    ),
    "values of other kinds": (
        "a.jsonl",
        lines([*PLAIN, {"prompt": "q", "completion": 5}, {"prompt": "q", "completion": None}]),
        3,
        [(4, "completion is a number", ""), (5, "completion is null", "")],
    ),
    "turns at fault": (
        "a.jsonl",
        lines(
            [
                CHATS[0],
                {"messages": [None]},
                {"messages": CHATS[0]["messages"][:1]},
                {"messages": [CHATS[0]["messages"][0], {"role": "assistant", "content": [{}]}]},
            ]
        ),
        1,
        [
            (2, "a turn is null", "messages[0]"),
            (3, "no answer", ""),
            (4, "a content part of type null", ""),
        ],
    ),
    "deep and wide": (
        "a.jsonl",
        lines(PLAIN) + '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
        3,
        [(4, "nested too deeply", "")],
    ),
    "rows of other widths": (
        "a.csv",
        f"{COLUMNS}q,a\nq\nq,a,b\n",
        1,
        [(3, "wrong number of fields", "1, the"), (4, "wrong number of fields", "3, the")],
    ),
    "tables joined with their headers": (
        "a.csv",
        f"{COLUMNS}q,a\n\ufeff{COLUMNS}r,b\n",
        2,
        [(3, "the header again", "joined")],
    ),
    "a quote written with a backslash": (
        "a.csv",
        f'{COLUMNS}q,"a \\"b\\" c"\nr,b\n',
        1,
        [(2, "quotes out of place", "within the line")],
    ),
    "nulls and NUL in columns": (
        "a.parquet",
        table(completion=[None, "b\0"]),
        0,
        [(1, "completion is null", ""), (2, "a NUL character", "column 'completion'")],
    ),
    "bytes for text": (
        "a.parquet",
        table(prompt=[b"\xff", b"q"]),
        0,
        [(1, "a binary value", "column 'prompt'"), (2, "a binary value", "column 'prompt'")],
    ),
}


@pytest.mark.parametrize(("name", "content", "count", "expected"), DROPPED.values(), ids=DROPPED)
def test_rows_are_dropped_with_a_reason(
    tmp_path: Path,
    name: str,
    content: Content,
    count: int,
    expected: list[tuple[int, str, str]],
) -> None:
    put(tmp_path / name, content)
    num_used, dropped = outcome(tmp_path / name)
    assert num_used == count
    assert [(number, reason) for number, reason, _ in dropped] == [one[:2] for one in expected]
    for (_, _, told), (_, _, part) in zip(dropped, expected, strict=True):
        assert part in told


REFUSED: dict[str, tuple[str, Content, tuple[str, ...]]] = {
    "objects over several lines": (
        "a.jsonl",
        "".join(json.dumps(one, indent=2) + "\n" for one in PLAIN),
        ("a.jsonl:5", "another value begins behind the end of the first", "jq -c ."),
    ),
    "a comma too many": ("a.json", f"{json.dumps(PLAIN)[:-1]},\n]", ("a.json:2", "a comma stands")),
    "a comment in a list": ("a.json", "[\n// all\n{}]", ("a.json:2", "JSON has no comments")),
    "a list cut off": ("a.json", json.dumps(PLAIN)[:-9], ("a.json:1", "cut off")),
    "two lists": (
        "a.json",
        json.dumps({"train": PLAIN, "test": PLAIN}),
        ("two lists of objects, 'train' and 'test'",),
    ),
    "columns of pandas": (
        "a.json",
        json.dumps({"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a", "1": "b"}}),
        ("a.json:1", "it holds columns, not rows", 'orient="records"'),
    ),
    "a server's answer": (
        "a.json",
        json.dumps({"error": {"code": 404}}),
        ("a.json:1 has the keys error",),
    ),
    "words": ("a.json", "Not Found", ("a.json:1", "neither [ nor { begins it, but 'Not Found'")),
    "nested a million times": ("a.json", "[" * 1_000_000, ("a.json:1", "nested too deeply")),
    "JSON called .tsv": ("a.tsv", json.dumps(PLAIN, indent=1), ("a JSON list; set format: json",)),
    "rows of two schemas": (
        "a.jsonl",
        lines([*PLAIN, *CHATS]),
        ("a.jsonl:1 is prompt_completion", "a.jsonl:4 is messages"),
    ),
    "Latin-1": (
        "a.csv",
        f"{COLUMNS}q,größe\n".encode("latin-1"),
        ("is not UTF-8 text", "(line 2)"),
    ),
    "UTF-32": ("a.jsonl", lines(PLAIN).encode("utf-32-le"), ("looks like UTF-32",)),
    "a pickle without a mark": ("a.jsonl", pickle.dumps(PLAIN, 0), ("is a pickle, which could",)),
    "a workbook": ("a.csv", excel, ("is an Excel workbook; export it as .csv",)),
    "an array": ("a.jsonl", b"\x93NUMPY\x01\0" + bytes(120), ("is a NumPy array",)),
    "a pointer": (
        "a.parquet",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        ("is a Git LFS pointer, not the data; run git lfs pull",),
    ),
    "a page": ("a.jsonl", "<!-- 404 -->\n<html></html>", ("is an HTML or XML page",)),
    "gzip cut off": (
        "a.jsonl.gz",
        gzip.compress(lines(PLAIN).encode())[:-9],
        ("is cut off within its gzip data",),
    ),
    "gzip with a tail": (
        "a.jsonl.gz",
        gzip.compress(lines(PLAIN).encode()) + b"tail",
        ("has damaged gzip data",),
    ),
    "a quote that stays open": (
        "a.csv",
        f'{COLUMNS}q,a\nr,"b\ns,c\n',
        ("a.csv:3 opens a quote that is never closed",),
    ),
    "no header": (
        "a.csv",
        "q1,a1\nq2,a2\n",
        ("a.csv:2 has the keys a1, q1", "first line is taken"),
    ),
    "a server's error": ("a.json", '{"error": "rate limit", "code": 429}', ("server's error",)),
    "a header alone": ("a.csv", COLUMNS, ("holds no rows",)),
    "names there twice": ("a.csv", "prompt,prompt\nq,r\n", ("a.csv:1 names the column 'prompt'",)),
    "no rows in columns": (
        "a.parquet",
        lambda path: pq.write_table(pa.Table.from_pylist(PLAIN).slice(0, 0), path),
        ("holds no rows",),
    ),
    "columns cut off": (
        "a.feather",
        lambda path: rewrite(path, feather, lambda content: content[:-40]),
        ("is damaged or cut off",),
    ),
    "a pipe in a folder": (
        "d",
        folder({"a.jsonl": lines(PLAIN), "b.jsonl": os.mkfifo}),
        ("d/b.jsonl is a named pipe",),
    ),
    "a link to nothing in a folder": (
        "d",
        folder({"a.jsonl": lines(PLAIN), "b.jsonl": lambda path: path.symlink_to("nowhere")}),
        ("d/b.jsonl is a link to a file that is not there",),
    ),
    "an empty file in a folder": (
        "d",
        folder({"a.jsonl": lines(PLAIN), "b.jsonl": ""}),
        ("d/b.jsonl is empty (0 bytes)",),
    ),
    "a folder of papers": (
        "d",
        folder({"README.md": "all"}),
        ("is a folder without data files; it holds README.md",),
    ),
}


@pytest.mark.parametrize(("name", "content", "messages"), REFUSED.values(), ids=REFUSED)
def test_is_refused(tmp_path: Path, name: str, content: Content, messages: tuple[str, ...]) -> None:
    put(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        outcome(tmp_path / name)
    for message in (str(tmp_path), *messages):
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("more.jsonl", "the name has no split, and those of others have train"),
        ("train.jsonl.bz2", "no data, by the name"),
        ("train.jsonl.incomplete", "no data, by the name"),
        ("state.json", "no data, by the name"),
    ],
)
def test_no_file_of_a_folder_goes_without_a_word(tmp_path: Path, name: str, why: str) -> None:
    for file in ("train.jsonl", name, "README.md"):
        (tmp_path / file).write_text(lines(PLAIN))
    assert outcome(tmp_path) == (3, [])
    assert files_left_out(SourceSpec(path=str(tmp_path))) == (f"{name} ({why})",)
