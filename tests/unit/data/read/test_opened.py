"""From bytes to text: compression, encodings, and files that are no data at all."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import sqlite3
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.data.read.opened import (
    CHUNK_BYTES,
    SourceFile,
    lines,
    text_chunks,
    unpacked_file,
    with_line_feeds,
)

from .files import ROWS, good, outcome, read, refusal, write
from .files import lines as json_lines_of

TEXT = json_lines_of(ROWS)
NOISE = random.Random(0).randbytes(9000)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


def gzipped(content: bytes) -> bytes:
    """Without the time: what a test is named by is the same in every process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.gz", "a.zst"])
@pytest.mark.parametrize("pack", [bytes, gzipped, zstd])
def test_compression_goes_by_the_content(tmp_path: Path, name: str, pack: type[bytes]) -> None:
    assert good(write(tmp_path, name, pack(TEXT.encode()))) == ROWS


@pytest.mark.parametrize("pack", [gzipped, zstd])
def test_parts_that_follow_each_other(tmp_path: Path, pack: type[bytes]) -> None:
    path = write(tmp_path, "a.jsonl", pack(TEXT.encode()) + pack(TEXT.encode()))
    assert [number for number, _ in outcome(path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzipped(NOISE)[:5000], "is cut off within its gzip data"),
        (gzipped(TEXT.encode())[:-1], "is cut off within its gzip data"),
        (gzipped(TEXT.encode())[:12], "is cut off within its gzip data"),
        (gzipped(TEXT.encode())[:-8] + bytes(8), "has damaged gzip data"),
        (gzipped(TEXT.encode()) + b"more", "has damaged gzip data"),
        (zstd(NOISE)[:5000], "is cut off within its zstd data"),
        (zstd(TEXT.encode())[:-1], "is cut off within its zstd data"),
        (zstd(TEXT.encode()) + b"more and more", "has damaged zstd data"),
        (gzipped(b""), "is empty once unpacked"),
        (gzipped(gzipped(TEXT.encode())), "is compressed twice"),
        (gzipped(TEXT.encode() + b"\xe4"), "of the unpacked text (line 4)"),
    ],
)
def test_compressed_data_at_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, "a.jsonl.gz", content)
    told = refusal(path)
    assert message in told
    assert told.startswith(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_mark(tmp_path: Path, encoding: str) -> None:
    record = {"text": "naïve 描述 😀"}
    content = json_lines_of([record, record]).encode(encoding)
    assert good(write(tmp_path, "a.jsonl", content)) == [record, record]
    big_endian = b"\xfe\xff" + json_lines_of([record]).encode("utf-16-be")
    assert good(write(tmp_path, "a.jsonl", big_endian)) == [record]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": "x"}\n{"a": "na\xefve"}\n', "is not UTF-8 text: invalid continuation byte at byte "
         "20 (line 2)"),
        (b'{"a": "\xed\xa0\x80"}', "at byte 7 (line 1)"),
        (b'\xef\xbb\xbf{"a": "\xff"}', "at byte 10 (line 1)"),
        (b'{"a": "x"}\n\xc3', "unexpected end of data at byte 11 (line 2)"),
        (b"\xff\xfea\0b", "is not UTF-16 text: truncated data at byte 4 (line 1)"),
        ('{"a": "xy"}'.encode("utf-16-le"), "looks like UTF-16 without a byte order mark"),
        ('{"a": "xy"}'.encode("utf-32"), "is UTF-32 text; save it as UTF-8"),
        ('{"a": "xy"}'.encode("utf-32-be"), "looks like UTF-32 without a byte order mark"),
        (b"\x00\x01\x02\x93\x99" * 30, "is a binary file, not text"),
        (bytes(5000), "is nothing but NUL bytes"),
        (b"", "is empty (0 bytes)"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, "a.jsonl", content)
    told = refusal(path)
    assert message in told
    assert told.startswith(path)


def test_a_fault_far_into_a_file_is_placed(tmp_path: Path) -> None:
    content = b'{"a": "\xc3\xa4"}\n' * 100_000 + b'{"a": "\xe4"}\n'
    path = write(tmp_path, "a.jsonl", content)
    offset = 100_000 * len(b'{"a": "\xc3\xa4"}\n') + 7
    assert f"at byte {offset} (line 100001)" in refusal(path)
    assert len(read(path, max_rows=100_000)) == 100_000


@given(st.text(max_size=80), st.integers(1, 5))
def test_lines_join_to_the_text(text: str, size: int) -> None:
    found = list(lines(text[at : at + size] for at in range(0, len(text), size)))
    assert "".join(line or "" for line in found) == text
    assert all(line and line.find("\n") in (-1, len(line) - 1) for line in found)


@given(st.text("a\r\n", max_size=30), st.integers(1, 4))
def test_ends_of_lines(text: str, size: int) -> None:
    parts = (text[at : at + size] for at in range(0, len(text), size))
    expected = io.StringIO(text, newline=None).read()
    assert "".join(with_line_feeds(parts)) == expected


@given(st.text(max_size=200), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str, code: str) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = "x" + text  # an unmarked text that begins with a mark has one
    path.write_bytes(text.encode(code))
    expected = re.sub("\n\ufeff+", "\n", text)
    assert "".join(text_chunks(SourceFile(path, "a", "text"))) == expected


@pytest.mark.parametrize("position", [0, CHUNK_BYTES - 1, CHUNK_BYTES])
def test_a_mark_at_the_start_of_a_line_is_no_text(tmp_path: Path, position: int) -> None:
    """As where files that have one each were joined; elsewhere it is a character of the text."""
    path = tmp_path / "a.txt"
    before = "x" * (position - 1) + "\n" if position else ""
    path.write_text(f"{before}\ufeff\ufeffone\ufeff\n\ufeff\ntwo", encoding="utf-8")
    assert "".join(text_chunks(SourceFile(path, "a", "text"))) == before + "one\ufeff\n\ntwo"


def excel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return packed.getvalue()


def torch_file() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    return packed.getvalue()


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "made.db") as made:
        made.execute("create table t (x)")
    return (folder / "made.db").read_bytes()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.arrow"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "a Git LFS pointer, not the data; run git lfs pull"),
        (pickle.dumps(ROWS), "a pickle"),
        (pickle.dumps(ROWS, protocol=2), "a pickle"),
        (pickle.dumps(ROWS, protocol=1), "a pickle"),
        (pickle.dumps(ROWS, protocol=0), "a pickle"),
        ("\ufeff" + LFS, "a Git LFS pointer, not the data; run git lfs pull"),
        (torch_file(), "a PyTorch file, which holds a pickle"),
        (excel(), "an Excel workbook; export it as .csv"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a sound file"),
        (b"GGUF\x03\0\0\0", "a GGUF model"),
        (struct.pack("<Q", 60) + b'{"weight":{"dtype":"F32"}}', "a safetensors file"),
        (b"BZh91AY&SY", "compressed with bzip2"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x00", "a tar archive"),
        ("<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML or XML page"),
        (" \n<html lang=en>", "an HTML or XML page"),
        ("<!-- moved --><p>Not found", "an HTML or XML page"),
        ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an HTML or XML page"),
    ],
)
def test_what_is_no_data(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    if message.endswith("page") and name in ("a.parquet", "a.arrow"):
        return
    assert f"{name} is {message}" in refusal(write(tmp_path, name, content))


def test_a_database(tmp_path: Path) -> None:
    assert "is an SQLite database" in refusal(write(tmp_path, "a.json", database(tmp_path)))


def test_a_page_can_be_wanted(tmp_path: Path) -> None:
    page = "<html></html>"
    assert good(write(tmp_path, "a.txt", page), format="text") == [{"text": page}]


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert refusal(tmp_path / "a.jsonl").endswith("is a named pipe; only regular files are read.")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    assert "b.jsonl is a device" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    assert "c.jsonl is a link to a file that is not there" in refusal(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").symlink_to("d.jsonl")
    assert "d.jsonl' cannot be looked up" in refusal(tmp_path / "d.jsonl")
    write(tmp_path, "sub/data.jsonl", TEXT)
    (tmp_path / "e.jsonl").symlink_to("sub/data.jsonl")
    assert good(tmp_path / "e.jsonl") == ROWS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_forbidden_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", TEXT)
    os.chmod(path, 0)
    assert refusal(path) == f"{path} cannot be read: Permission denied."


def test_unpacked_bytes_are_random_access(tmp_path: Path) -> None:
    content = os.urandom(600_000)
    path = Path(write(tmp_path, "a", zstd(content)))
    with unpacked_file(SourceFile(path, "a", "parquet", "zstd")) as opened:
        opened.seek(500_000)
        assert opened.read(10) == content[500_000:500_010]
