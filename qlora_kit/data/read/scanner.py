"""A place in JSON text that is read as it comes, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import Any

from qlora_kit.data.read.strict_json import (
    LENIENT,
    NUL_ESCAPE,
    STRICT,
    Refusal,
    as_record,
    shown,
    why_not_json,
    words,
)
from qlora_kit.data.rows import Record
from qlora_kit.errors import DataError

BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{BLANK}]*")
_TURN_LISTS = frozenset({"messages", "conversations", "conversation"})
_TURN_KEYS = frozenset({"role", "from", "speaker"})

# An unfinished literal, number or escape is reported at most this far from the end of the text.
_LONGEST_TOKEN = 12


class Scanner:
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
            what = f"{' or '.join(characters)} is expected, found {found!r}"
            raise self.fault(what + self.remark())
        self._at += 1
        return found

    def refuse_comma_before(self, closing: str) -> None:
        if self.peek() == closing:
            raise self.fault(f"a comma stands before {closing}", "Remove it")

    def ahead(self) -> str:
        """What stands at the place, short and printable."""
        return shown(self._next(41))

    def remark(self) -> str:
        """What is commonly wrong where the place is, as the end of a sentence."""
        return why_not_json(self._next(_LONGEST_TOKEN), 0, "")

    def _next(self, size: int) -> str:
        while len(self._text) - self._at < size and self._read_on():
            pass
        return self._text[self._at : self._at + size]

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
        has_nul = self._text.find(NUL_ESCAPE, start, self._at) >= 0
        return as_record(value, num_openings, has_nul=has_nul)

    def value(self) -> Any:
        """As `record`, of any kind."""
        return self._parse()[0]

    def begins_with_row(self, *, is_row_key: bool) -> bool:
        """Whether the list that is next begins with an object, no turn of a conversation; under
        a key that rows have, with one that itself holds turns. The place stays.
        """
        offset = 1
        while (first := self._skip_blanks(self._at + offset)) == len(self._text):
            offset = first - self._at
            if not self._read_on():
                return False
        if self._text[first] != "{":
            return False
        keys = self._decode(LENIENT, first - self._at)[0]
        if is_row_key:
            return not _TURN_LISTS.isdisjoint(keys)
        return _TURN_KEYS.isdisjoint(keys)

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
                raise self._broken(error, self._at + offset) from None
            except RecursionError:
                raise self.fault("it is nested too deeply") from None
            # A number may: 1 may be the start of 12, and in `1.5e-` only 1.5 is one so far.
            is_number = self._text[end - 1] not in '}]"'
            may_go_on = is_number and end >= len(self._text) - _LONGEST_TOKEN
            if not (may_go_on and self._read_on()):
                return value, end - self._at

    def _broken(self, error: JSONDecodeError, start: int) -> DataError:
        self._at = error.pos
        if not self._text[error.pos :].strip(BLANK):
            return self._cut_off()
        if error.msg.startswith("Unterminated string"):
            return self._cut_off("the file ends within the text that begins here")
        value = self._text[start : error.pos + _LONGEST_TOKEN]
        remark = why_not_json(value, error.pos - start, error.msg)
        return self.fault(f"it is not JSON: {words(error)}{remark}")

    def _cut_off(self, what: str = "the file ends within its list or object") -> DataError:
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
