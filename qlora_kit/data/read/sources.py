"""From a source in a recipe to its rows: which files, in which format, and what they hold."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from qlora_kit.data.read.delimited import delimited_rows
from qlora_kit.data.read.files import find_files, is_local
from qlora_kit.data.read.hub import DEMO_PREFIX, demo_source, hub_source, remote_fingerprint
from qlora_kit.data.read.json_rows import holds_lines, json_lines, json_value
from qlora_kit.data.read.kinds import is_page, no_data, wide_encoding
from qlora_kit.data.read.opened import (
    CHUNK_BYTES,
    Compression,
    KnownFormat,
    SourceFile,
    byte_chunks,
    compression_of,
    text_chunks,
    with_lone_returns,
)
from qlora_kit.data.read.plain_text import text_rows
from qlora_kit.data.rows import BadRow, Row
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import COMPRESSED_ENDINGS, FileFormat, SourceSpec

_FORMAT_OF: dict[str, KnownFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
_BINARY: dict[bytes, KnownFormat] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # an IPC stream
}
# How JSON begins under the name of another format, what that is, and the format to ask for.
_JSON_STARTS = {
    re.compile(r'\{".*\}[ \t\r]*(\n|$)'): ("object", "jsonl"),
    re.compile(r'\{[ \t\r]*\n\s*"'): ("object", "json"),
    re.compile(r'\[\s*\{\s*"'): ("list", "json"),
}


def read_source(spec: SourceSpec, *, streaming: bool = False) -> Iterator[Row | BadRow]:
    """The rows of a source, good and bad, in order: all of them or the first `max_rows`.

    What stands after those is not looked at, so it may be broken. `streaming` concerns the hub
    alone: its rows are then not stored on this machine.

    Raises:
        DataError: the source is missing, unreadable, not what it is said to be, or has no rows.
    """
    num_rows = 0
    for row in islice(_every_row(spec, streaming=streaming), spec.max_rows):
        num_rows += 1
        yield row
    if not num_rows:
        raise DataError(f"{spec.path} holds no rows; there is nothing to read.")


def require_readable(sources: Iterable[SourceSpec]) -> None:
    """That they are there and begin with a row: to be told before any model is loaded.

    Raises:
        DataError: as `read_source`.
    """
    for source in sources:
        next(read_source(source, streaming=True))


def source_files(spec: SourceSpec) -> tuple[SourceFile, ...]:
    """The files that a source consists of; a source on the hub, or the demo, has none.

    Raises:
        DataError: one is missing or holds no rows for all that its first bytes say.
    """
    if spec.path.startswith(DEMO_PREFIX) or not is_local(spec.path):
        return ()
    found = find_files(spec.path, spec.split)
    return tuple(_recognised(path, name, spec.format) for path, name in found.files)


def files_left_out(spec: SourceSpec) -> tuple[str, ...]:
    """Files of a folder, or of a pattern, that are not read though they might be data, each with
    the reason; those of another split are not among them.

    Raises:
        DataError: as `source_files`.
    """
    if spec.path.startswith(DEMO_PREFIX) or not is_local(spec.path):
        return ()
    return find_files(spec.path, spec.split).left_out


def source_fingerprint(spec: SourceSpec) -> str:
    """A digest of every byte that the source may give rows from, and of its files' names.

    Raises:
        DataError: as `source_files`.
    """
    files = source_files(spec)
    if not files:
        return remote_fingerprint(spec)
    digest = hashlib.blake2b(digest_size=32)
    for file in files:
        digest.update(f"{len(file.name)} {file.name} {file.path.stat().st_size} ".encode())
        for chunk in byte_chunks(file.path, file.name, None):
            digest.update(chunk)
    return digest.hexdigest()


def _every_row(spec: SourceSpec, *, streaming: bool) -> Iterator[Row | BadRow]:
    if spec.path.startswith(DEMO_PREFIX):
        yield from demo_source(spec)
    elif not is_local(spec.path):
        yield from hub_source(spec, streaming=streaming)
    else:
        for file in source_files(spec):
            yield from _rows_of(file, spec)


def _rows_of(file: SourceFile, spec: SourceSpec) -> Iterator[Row | BadRow]:
    if file.format in ("parquet", "arrow"):
        from qlora_kit.data.read.columnar import columnar_rows

        return columnar_rows(file)
    chunks = text_chunks(file)
    if file.format == "text":
        return text_rows(file.name, chunks, spec.text_rows)
    chunks = with_lone_returns(chunks)
    if file.format == "jsonl":
        return json_lines(file.name, chunks)
    if file.format == "json":
        return json_value(file.name, chunks)
    return delimited_rows(file.name, chunks, "\t" if file.format == "tsv" else ",")


def _recognised(path: Path, name: str, asked: FileFormat) -> SourceFile:
    """The file with its format: as asked, else by its content, else by its name."""
    compression = compression_of(path, name)
    head = next(byte_chunks(path, name, compression), b"")
    if not head.strip() and len(head) < CHUNK_BYTES:
        what = "holds nothing but white space" if head else "is empty once unpacked"
        raise DataError(f"{name} {what}; write or fetch it again.")
    refused = no_data(head.removeprefix(codecs.BOM_UTF8))
    if refused is not None:
        raise DataError(f"{name} is {refused[0]}; {refused[1]}.")
    binary = next((kind for magic, kind in _BINARY.items() if head.startswith(magic)), None)
    if binary is not None:
        if asked not in ("auto", binary):
            raise DataError(f"{name} is a {binary} file; format: {asked} cannot read it.")
        return SourceFile(path, name, binary, compression)
    _check_text(name, head, asked)
    kind = _text_format(path, name, compression) if asked == "auto" else asked
    if kind in ("parquet", "arrow"):
        raise DataError(f"{name} is no {kind} file by its first bytes; fetch or write it again.")
    return SourceFile(path, name, kind, compression)


def _check_text(name: str, head: bytes, asked: FileFormat) -> None:
    """Refuse what its first bytes show to be no text, or a page."""
    if is_page(head) and asked != "text":
        raise DataError(
            f"{name} is an HTML or XML page, not data; what was to be downloaded may need a login "
            "or another address."
        )
    if b"\0" not in head or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    encoding = wide_encoding(head)
    if encoding is not None:
        raise DataError(
            f"{name} looks like {encoding} without a byte order mark; save it as UTF-8."
        )
    try:
        head[:-4].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is a binary file, not text (NUL bytes, and {error.reason} at byte "
            f"{error.start}); name a file of rows."
        ) from None


def _text_format(path: Path, name: str, compression: Compression | None) -> KnownFormat:
    by_name = _format_by_name(path)
    file = SourceFile(path, name, by_name or "text", compression)
    start = _start(file)
    if start[:1] in ("[", "{") and by_name in ("json", "jsonl", None):
        chunks = with_lone_returns(text_chunks(file))
        is_lines = holds_lines(chunks, is_named_so=by_name == "jsonl")
        return "jsonl" if is_lines else "json"
    if by_name is None:
        raise DataError(
            f"{name} has the ending {path.suffix or '(none)'}, and its content does not tell "
            f"what it is; name its format (format: csv), or use {', '.join(_FORMAT_OF)}."
        )
    begins_with = next((what for form, what in _JSON_STARTS.items() if form.match(start)), None)
    if begins_with is not None:
        what, asked = begins_with
        raise DataError(
            f"{name} begins with a JSON {what}; set format: {asked}, or format: {by_name} if it is "
            "what its name says."
        )
    return by_name


def _format_by_name(path: Path) -> KnownFormat | None:
    name = path.name.lower()
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return _FORMAT_OF.get(Path(name).suffix)


def _start(file: SourceFile) -> str:
    return next(text_chunks(file), "").lstrip(" \t\r\n")
