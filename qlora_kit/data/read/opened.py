"""From a file to its bytes and its text: compression, encoding, and what cannot be opened."""

from __future__ import annotations

import codecs
import gzip
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from qlora_kit.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

KnownFormat = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow", "text"]
Compression = Literal["gzip", "zstd"]

CHUNK_BYTES = 1 << 18
MAX_CHARACTERS = 1 << 28
"""The longest line, element of a list, or whole text that is taken into memory."""

_MARK = "\ufeff"
_MARKS_AT_START = re.compile(f"\n{_MARK}+")
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that is read: where it is, how it is called to the user, and what it holds."""

    path: Path
    name: str
    format: KnownFormat
    compression: Compression | None = None


def check_regular(path: Path, name: str) -> None:
    """Refuse, without opening it, what is no regular file; a FIFO would block for ever.

    Raises:
        DataError: it is no regular file.
        OSError: it is not there, or cannot be looked at.
    """
    if path.is_symlink() and not path.exists():
        raise DataError(f"{name} is a link to a file that is not there; mend the link.")
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    what = kinds.get(stat.S_IFMT(mode), "no file")
    raise DataError(f"{name} is {what}; only regular files are read.")


def compression_of(path: Path, name: str) -> Compression | None:
    """By the first bytes, whatever the name says.

    Raises:
        DataError: the file cannot be opened, or has no bytes.
    """
    with _faults(name):
        check_regular(path, name)
        with path.open("rb") as raw:
            head = raw.read(4)
    if not head:
        raise DataError(f"{name} is empty (0 bytes); write or fetch it again.")
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    # The second is a frame that may stand before the data and is skipped.
    if head == b"\x28\xb5\x2f\xfd" or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return "zstd"
    return None


def byte_chunks(path: Path, name: str, compression: Compression | None) -> Iterator[bytes]:
    """The unpacked bytes, piece by piece; gzip members and zstd frames may follow each other.

    Raises:
        DataError: the file cannot be read, or its compressed data are cut off or damaged.
    """
    with _faults(name), _unpacked(path, compression) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _unpacked(path: Path, compression: Compression | None) -> Iterator[IO[bytes]]:
    if compression == "gzip":
        with gzip.open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif compression == "zstd":
        import pyarrow as pa

        with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, "zstd") as stream:
            yield stream
    else:
        with path.open("rb") as stream:
            yield stream


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Turn what the system says about a file into a DataError."""
    again = "fetch or write it again"
    try:
        yield
    except EOFError:
        raise DataError(f"{name} is cut off within its gzip data; {again}.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} has damaged gzip data ({error}); {again}.") from None
    except OSError as error:
        if error.strerror is None:  # Arrow's, which has only words
            what = "is cut off within its" if "Truncated" in str(error) else "has damaged"
            raise DataError(f"{name} {what} zstd data ({error}); {again}.") from None
        raise DataError(f"{name} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{name!r} cannot be read: {error}.") from None


@contextmanager
def unpacked_file(file: SourceFile) -> Iterator[pa.NativeFile]:
    """The file for random access: memory-mapped, or unpacked to a nameless temporary file.

    Raises:
        DataError: it cannot be opened or unpacked.
    """
    import pyarrow as pa

    if file.compression is None:
        with _faults(file.name):
            mapped = pa.memory_map(str(file.path))
        with mapped:
            yield mapped
        return
    with tempfile.TemporaryFile() as whole:
        for chunk in byte_chunks(file.path, file.name, file.compression):
            whole.write(chunk)
        whole.seek(0)
        yield pa.PythonFile(whole, mode="r")


def text_chunks(file: SourceFile) -> Iterator[str]:
    """The text piece by piece, without byte order marks; UTF-8, or UTF-16 where a mark says so.

    A mark at the start of a later line, where a file was appended to another, is no text either.
    What stands before a byte that is no text comes out before that byte is refused.

    Raises:
        DataError: as `byte_chunks`, or the bytes are not text in that encoding.
    """
    return _without_marks(_decoded(file))


def _decoded(file: SourceFile) -> Iterator[str]:
    chunks = byte_chunks(file.path, file.name, file.compression)
    first = next(chunks, b"")
    if first.startswith(codecs.BOM_UTF8):
        encoding, mark = "utf-8", codecs.BOM_UTF8
    else:
        mark = first[:2] if first[:2] in _UTF16 else b""
        encoding = _UTF16.get(mark, "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    num_bytes, num_lines = len(mark), 0
    pending: bytes | None = first[len(mark) :]
    while pending is not None:
        following = next(chunks, None)
        num_bytes += len(pending)
        try:
            text = decoder.decode(pending, final=following is None)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding)
            yield before
            offset = num_bytes - len(error.object) + error.start
            line = num_lines + before.count("\n") + 1
            raise _no_text(file, encoding, error.reason, offset, line) from None
        num_lines += text.count("\n")
        yield text
        pending = following


def _without_marks(chunks: Iterator[str]) -> Iterator[str]:
    """The same text without what stands at the start of a line as a byte order mark."""
    starts_line = True
    for chunk in chunks:
        text = chunk
        if _MARK in text:
            text = text.lstrip(_MARK) if starts_line else text
            text = _MARKS_AT_START.sub("\n", text)
        if text:
            starts_line = text.endswith("\n")
        yield text


def _no_text(file: SourceFile, encoding: str, reason: str, offset: int, line: int) -> DataError:
    kind = "UTF-16" if encoding.startswith("utf-16") else "UTF-8"
    unpacked = " of the unpacked text" if file.compression else ""
    return DataError(
        f"{file.name} is not {kind} text: {reason} at byte {offset}{unpacked} (line {line}). "
        "Save it as UTF-8."
    )


def lines(chunks: Iterator[str], limit: int = MAX_CHARACTERS) -> Iterator[str | None]:
    """Lines with their line feeds, which the last may lack; None for one over `limit` characters.

    Only a line feed ends a line: U+2028 and its kin may stand in a JSON string.
    """
    parts: list[str] = []
    size, too_long = 0, False
    for chunk in chunks:
        first, *others = chunk.split("\n")
        size += len(first)
        too_long = too_long or size > limit
        if too_long:
            parts.clear()
        else:
            parts.append(first)
        if others:
            yield None if too_long else "".join(parts) + "\n"
            yield from (line + "\n" for line in others[:-1])
            parts, size, too_long = [others[-1]], len(others[-1]), False
    if too_long:
        yield None
    elif last := "".join(parts):
        yield last


def with_lone_returns(chunks: Iterator[str]) -> Iterator[str]:
    """The same text with each CR as a line feed, where its beginning has CR and no line feed."""
    first = next(chunks, "")
    text = chain((first,), chunks)
    if "\r" in first and "\n" not in first:
        return (piece.replace("\r", "\n") for piece in text)
    return text


def with_line_feeds(chunks: Iterator[str]) -> Iterator[str]:
    """The same text with every CR LF, and every CR alone, as one line feed."""
    held = ""
    for chunk in chunks:
        text = held + chunk
        held = "\r" if text.endswith("\r") else ""
        text = text.removesuffix("\r")
        yield text.replace("\r\n", "\n").replace("\r", "\n")
    if held:
        yield "\n"
