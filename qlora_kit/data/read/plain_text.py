"""Rows of .txt: the file, its paragraphs, or its lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qlora_kit.data.read.opened import MAX_CHARACTERS, lines, with_line_feeds
from qlora_kit.data.read.strict_json import NUL
from qlora_kit.data.rows import BadRow, Row
from qlora_kit.errors import DataError


def text_rows(
    name: str,
    chunks: Iterator[str],
    rows: Literal["file", "paragraph", "line"],
    limit: int = MAX_CHARACTERS,
) -> Iterator[Row | BadRow]:
    """Rows `{"text": …}` with line feeds for every end of line; blank ones are none.

    A paragraph ends before a line with nothing but white space; neither it nor a line keeps
    the line feed at its end. A row's number is its first line.

    Raises:
        DataError: a row has more than `limit` characters.
    """
    parts: list[str] = []
    start, size = 1, 0
    for number, line in enumerate(lines(with_line_feeds(chunks), limit), start=1):
        size += limit + 1 if line is None else len(line)
        if line is None or size > limit:
            raise DataError(
                f"{name}:{start} begins a text of more than {limit:,} characters. "
                "Set text_rows: paragraph or line, or divide it."
            )
        if rows == "line":
            yield from _row(name, number, line.removesuffix("\n"))
            size = 0
        elif rows == "paragraph" and not line.strip():
            yield from _row(name, start, "".join(parts).removesuffix("\n"))
            parts, start, size = [], number + 1, 0
        else:
            parts.append(line)
    whole = "".join(parts)
    yield from _row(name, start, whole if rows == "file" else whole.removesuffix("\n"))


def _row(name: str, number: int, text: str) -> Iterator[Row | BadRow]:
    if "\0" in text:
        detail = "text has none; the file may be damaged, or no text at all"
        yield BadRow(name, number, NUL, detail)
    elif text.strip():
        yield Row(name, number, {"text": text})
