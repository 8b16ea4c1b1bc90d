"""Rows of JSON Lines, of one list, of an object that wraps one list, and of a single object."""

from __future__ import annotations

import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any

from qlora_kit.data.read.opened import MAX_CHARACTERS, lines
from qlora_kit.data.read.strict_json import LENIENT, STRICT, Refusal, as_record, parse_line
from qlora_kit.data.rows import BadRow, Record, Row
from qlora_kit.errors import DataError

BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{BLANK}]*")
# Lists of objects that belong to one row, and are not rows themselves.
_ROW_KEYS = frozenset(
    {
        "messages",
        "conversations",
        "conversation",
        "dialog",
        "dialogue",
        "turns",
        "chosen",
        "rejected",
        "prompt",
        "completion",
        "history",
        "tools",
        "functions",
        "function",
        "tool_calls",
    }
)
_TURN_KEYS = frozenset({"role", "from", "speaker"})

# An unfinished literal, number or escape is reported at most this far from the end of the text.
_LONGEST_TOKEN = 12


def json_lines(
    name: str, chunks: Iterator[str], limit: int = MAX_CHARACTERS
) -> Iterator[Row | BadRow]:
    """One object a line; blank lines count, and are no rows."""
    for number, line in enumerate(lines(chunks, limit), start=1):
        if line is None:
            yield BadRow(name, number, "row too long", f"more than {limit:,} characters")
        elif line.strip(BLANK):
            try:
                yield Row(name, number, parse_line(line))
            except Refusal as refusal:
                yield BadRow(name, number, refusal.reason, refusal.detail)


def holds_lines(chunks: Iterator[str], *, is_named_so: bool) -> bool:
    """Whether text is JSON Lines rather than one JSON value.

    Inside a value that goes on over a line's end, that line ends with an opening or separating
    character, or the next begins with a separating or closing one; between two objects neither
    is so. `is_named_so` (.jsonl) settles what else would be open: a single line, and a line
    that is broken.
    """
    first, last, following = _around_first_line_end(chunks)
    if first == "[":
        return last == "]" and following != "" and following not in ",:]}"
    if is_named_so:
        return not (first == last == "{")
    return following != "" and following not in ",:]}" and last not in "{[,:"


def _around_first_line_end(chunks: Iterator[str]) -> tuple[str, str, str]:
    """First and last character of the first line, and the first behind it; blanks aside."""
    first = last = ""
    for chunk in chunks:
        rest = chunk
        if not first:
            rest = rest.lstrip(BLANK)
            first = rest[:1]
        while rest:
            line, line_feed, rest = rest.partition("\n")
            last = line.rstrip(BLANK)[-1:] or last
            if line_feed:
                return first, last, _first_character(rest, chunks)
    return first, last, ""


def _first_character(rest: str, chunks: Iterator[str]) -> str:
    while not (rest := rest.lstrip(BLANK)):
        following = next(chunks, None)
        if following is None:
            return ""
        rest = following
    return rest[0]


def json_value(
    name: str, chunks: Iterator[str], limit: int = MAX_CHARACTERS
) -> Iterator[Row | BadRow]:
    """Rows of one JSON value, read as it comes: a list, or an object.

    Rows are counted from 1, since several may share a line; faults name the line.

    Raises:
        DataError: the value is neither, or is broken where it cannot be gone on after.
    """
    scanner = _Scanner(name, chunks, limit)
    opening = scanner.peek()
    if opening == "[":
        yield from _list(scanner)
    elif opening == "{":
        yield from _wrapped(scanner)
    elif opening:
        raise scanner.fault("neither [ nor { begins it", "A .json file holds a list of objects")
    if scanner.peek():
        raise scanner.fault(
            "something stands behind its end",
            "A .json file holds one list; for one object a line set format: jsonl",
        )


def _list(scanner: _Scanner) -> Iterator[Row | BadRow]:
    for number, (line, value) in enumerate(_elements(scanner), start=1):
        if isinstance(value, Refusal):
            detail = f"line {line}: {value.detail}"
            yield BadRow(scanner.name, number, value.reason, detail)
        else:
            yield Row(scanner.name, number, value)


def _elements(scanner: _Scanner) -> Iterator[tuple[int, Record | Refusal]]:
    """Each element of the list that begins here, with the line on which it does."""
    scanner.take("[")
    if scanner.peek() == "]":
        scanner.take("]")
        return
    while True:
        scanner.peek()
        line = scanner.line
        try:
            yield line, scanner.record()
        except Refusal as refusal:
            yield line, refusal
        if scanner.take(",", "]") == "]":
            return


def _wrapped(scanner: _Scanner) -> Iterator[Row | BadRow]:
    """Rows of the one list of objects that this object wraps; without one it is a row itself."""
    record: Record = {}
    refused: Refusal | None = None
    wrapper: str | None = None
    scanner.take("{")
    while scanner.peek() != "}":
        key = scanner.key()
        scanner.take(":")
        if key in record or key == wrapper:
            refused = Refusal("a key twice", f"the object has the key {key!r} more than once")
        if scanner.peek() == "[" and key not in _ROW_KEYS and scanner.begins_with_row():
            if wrapper is not None:
                raise scanner.fault(
                    f"it holds two lists of objects, {wrapper!r} and {key!r}",
                    "Which has the rows cannot be told; save those as .jsonl",
                )
            wrapper = key
            yield from _list(scanner)
        else:
            try:
                record[key] = scanner.value()
            except Refusal as refusal:
                refused = refusal
        if scanner.take(",", "}") == "}":
            break
        if scanner.peek() == "}":
            raise scanner.fault("a comma stands before }", "Remove it")
    else:
        scanner.take("}")
    if wrapper is not None or (len(record) == 1 and [] in record.values()):
        return
    try:
        if refused is not None:
            raise refused
        yield Row(scanner.name, 1, as_record(record, MAX_CHARACTERS))
    except Refusal as refusal:
        yield BadRow(scanner.name, 1, refusal.reason, refusal.detail)


class _Scanner:
    """A place in JSON text of which only the part in hand is in memory."""

    def __init__(self, name: str, chunks: Iterator[str], limit: int):
        self.name = name
        self._chunks = chunks
        self._limit = limit
        self._text = ""
        self._at = 0
        self._line, self._counted_to = 1, 0

    @property
    def line(self) -> int:
        """Of the place, from 1."""
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._line

    def fault(self, what: str, hint: str = "") -> DataError:
        hint = f" {hint}." if hint else ""
        return DataError(f"{self.name}:{self.line} cannot be read: {what}.{hint}")

    def peek(self) -> str:
        """The next character that is not blank, and move to it; empty at the end."""
        while True:
            self._at = self._skip_blanks(self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self, *characters: str) -> str:
        """Move past the next character, which must be one of these."""
        found = self.peek()
        if found == "":
            raise self._cut_off()
        if found not in characters:
            raise self.fault(f"{' or '.join(characters)} is expected, found {found!r}")
        self._at += 1
        return found

    def key(self) -> str:
        if self.peek() != '"':
            self.take('"')
        return str(self.value())

    def record(self) -> Record:
        """The next value, an object.

        Raises:
            Refusal: it is none, or may not be a row; the place is behind it all the same.
            DataError: it is not JSON, so that its end cannot be found.
        """
        value, length = self._parse()
        start = self._at - length
        num_openings = sum(self._text.count(one, start, self._at) for one in "[{")
        return as_record(value, num_openings)

    def value(self) -> Any:
        """As `record`, of any kind."""
        return self._parse()[0]

    def begins_with_row(self) -> bool:
        """Whether the list that is next begins with an object, no turn of a conversation.

        The place stays.
        """
        offset = 1
        while (first := self._skip_blanks(self._at + offset)) == len(self._text):
            offset = first - self._at
            if not self._read_on():
                return False
        if self._text[first] != "{":
            return False
        return _TURN_KEYS.isdisjoint(self._decode(LENIENT, first - self._at)[0])

    def _skip_blanks(self, start: int) -> int:
        blanks = _BLANKS.match(self._text, start)
        assert blanks is not None
        return blanks.end()

    def _parse(self) -> tuple[Any, int]:
        """The next value and how many characters it has; the place is then behind it."""
        if not self.peek():
            raise self._cut_off()
        try:
            value, length = self._decode(STRICT)
        except Refusal:
            self._at += self._decode(LENIENT)[1]
            raise
        self._at += length
        return value, length

    def _decode(self, decoder: JSONDecoder, offset: int = 0) -> tuple[Any, int]:
        """The value that begins `offset` behind the place, and how far behind it ends."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at + offset)
            except JSONDecodeError as error:
                is_open = error.msg.startswith("Unterminated string")
                is_open |= error.pos >= len(self._text) - _LONGEST_TOKEN
                if is_open and self._read_on():
                    continue
                raise self._broken(error) from None
            except RecursionError:
                raise self.fault("it is nested too deeply") from None
            # A number may: 1 may be the start of 12, and in `1.5e-` only 1.5 is one so far.
            is_number = self._text[end - 1] not in '}]"'
            may_go_on = is_number and end >= len(self._text) - _LONGEST_TOKEN
            if not (may_go_on and self._read_on()):
                return value, end - self._at

    def _broken(self, error: JSONDecodeError) -> DataError:
        self._at = error.pos
        if not self._text[error.pos :].strip(BLANK):
            return self._cut_off()
        return self.fault(f"it is not JSON: {error.msg}")

    def _cut_off(self) -> DataError:
        what = "the file ends within its list or object"
        return self.fault(what, "It is cut off; fetch or write it again")

    def _read_on(self) -> bool:
        """Take in as much again as is in hand, so that no long value is read often.

        Nothing changes where there is no more.
        """
        assert self.line
        parts = [self._text[self._at :]]
        wanted, taken = max(1, len(parts[0])), 0
        if wanted > self._limit:
            raise self.fault(f"an element has more than {self._limit:,} characters")
        for chunk in self._chunks:
            parts.append(chunk)
            taken += len(chunk)
            if taken >= wanted:
                break
        if taken:
            self._text, self._at, self._counted_to = "".join(parts), 0, 0
        return taken > 0
