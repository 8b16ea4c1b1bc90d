"""Rows of JSON Lines, of one list, of an object that wraps one list, and of a single object."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_kit.data.read.opened import MAX_CHARACTERS, lines
from qlora_kit.data.read.scanner import BLANK, Scanner
from qlora_kit.data.read.strict_json import Refusal, as_record, parse_line
from qlora_kit.data.rows import BadRow, Record, Row

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
    scanner = Scanner(name, chunks, limit)
    opening = scanner.peek()
    if opening == "[":
        yield from _list(scanner)
    elif opening == "{":
        yield from _wrapped(scanner)
    elif opening:
        what = f"neither [ nor {{ begins it, but {scanner.ahead()}{scanner.remark()}"
        raise scanner.fault(what, "A .json file holds a list of objects")
    following = scanner.peek()
    if following and following in "{[":
        raise scanner.fault(
            "another value begins behind the end of the first",
            "A .json file holds one list; for one object a line set format: jsonl, and put what "
            "takes several lines on one before (jq -c . does)",
        )
    if following:
        raise scanner.fault(
            f"something stands behind its end{scanner.remark()}",
            "A .json file holds one list; for one object a line set format: jsonl",
        )


def _list(scanner: Scanner) -> Iterator[Row | BadRow]:
    for number, (line, value) in enumerate(_elements(scanner), start=1):
        if isinstance(value, Refusal):
            detail = f"line {line}: {value.detail}"
            yield BadRow(scanner.name, number, value.reason, detail)
        else:
            yield Row(scanner.name, number, value)


def _elements(scanner: Scanner) -> Iterator[tuple[int, Record | Refusal]]:
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
        scanner.refuse_comma_before("]")


def _wrapped(scanner: Scanner) -> Iterator[Row | BadRow]:
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
        if scanner.peek() == "[" and scanner.begins_with_row(is_row_key=key in _ROW_KEYS):
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
        scanner.refuse_comma_before("}")
    else:
        scanner.take("}")
    if wrapper is not None or (len(record) == 1 and [] in record.values()):
        return
    if _holds_columns(record):
        raise scanner.fault(
            "it holds columns, not rows",
            'Save a list of rows, [{"key": value, …}, …]; in pandas, to_json(orient="records")',
        )
    try:
        if refused is not None:
            raise refused
        yield Row(scanner.name, 1, as_record(record, MAX_CHARACTERS, has_nul=True))
    except Refusal as refusal:
        yield BadRow(scanner.name, 1, refusal.reason, refusal.detail)


def _holds_columns(record: Record) -> bool:
    """Whether each key has a list of as many single values, or these by the numbers of rows."""
    columns = list(record.values())
    if all(isinstance(one, dict) and "0" in one for one in columns):
        return len({tuple(one) for one in columns}) == 1
    if len(columns) < 2 or not all(isinstance(one, list) and one for one in columns):
        return False
    singles = all(not isinstance(value, (dict, list)) for one in columns for value in one)
    return singles and len({len(one) for one in columns}) == 1
