"""Rows of .csv and .tsv: text in every field, keyed by the file's own header."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from qlora_kit.data.read.opened import MAX_CHARACTERS, lines
from qlora_kit.data.read.strict_json import NUL
from qlora_kit.data.rows import BadRow, Row
from qlora_kit.errors import DataError

_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_SAID = re.compile(r'"?sep=(?P<delimiter>[,;|\t])"?[\r\n]*', re.IGNORECASE)
_UNNAMED = "Unnamed: "
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 40, 1 << 20


def delimited_rows(
    name: str, chunks: Iterator[str], preferred: str, limit: int = MAX_CHARACTERS
) -> Iterator[Row | BadRow]:
    """Rows in the dialect of RFC 4180; numbers stay text, and an empty field is an empty text.

    A row's number is the line on which it begins; the header has the first. Beyond the RFC:

    - `sep=;` on the first line, which Excel understands, names the delimiter and is no header.
    - Blanks around the names of columns are none of theirs; where a blank follows each delimiter
      of the header, it belongs to the delimiter.
    - A column without a name, such as the index that pandas writes, is called `Unnamed: 0` as
      pandas calls it when it reads one; its empty fields count as absent.
    - The header may not come again as a row, as it does where files were joined.

    Raises:
        DataError: the header is at fault, or a quote is opened and never closed.
    """
    physical = _physical_lines(name, chunks, limit)
    # For the process, so it is only ever raised; its own is 128 KiB.
    csv.field_size_limit(max(limit, csv.field_size_limit()))
    sample = _sample(physical)
    said = _SAID.fullmatch(sample[0]) if sample else None
    if said is not None:
        del sample[0]
    num_before = int(said is not None)
    delimiter = said["delimiter"] if said is not None else _delimiter(name, sample, preferred)
    is_spaced = _is_spaced(sample, delimiter)
    reader = csv.reader(
        chain(sample, physical), delimiter=delimiter, strict=True, skipinitialspace=is_spaced
    )
    header: list[str] | None = None
    names: list[str] = []
    while True:
        number = num_before + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            if header is None or _is_unclosed(error):
                raise _broken(name, number, error) from None
            last = num_before + reader.line_num
            for lost in range(number, last + 1):
                yield BadRow(name, lost, "quotes out of place", _lines_lost(number, last))
            continue
        if fields is None:
            return
        if not fields:
            continue  # a blank line
        if header is None:
            header = fields
            names = _checked_names(name, number, [field.strip() for field in fields])
        elif fields == header:
            yield BadRow(name, number, "the header again", "the file was joined from several")
        else:
            yield _row(name, number, names, fields)


def _physical_lines(name: str, chunks: Iterator[str], limit: int) -> Iterator[str]:
    """Lines with their ends, as the csv module wants them."""
    for number, line in enumerate(lines(chunks, limit), start=1):
        if line is None:
            raise DataError(f"{name}:{number} has more than {limit:,} characters.")
        yield line


def _sample(physical: Iterator[str]) -> list[str]:
    sample: list[str] = []
    while len(sample) < _SAMPLE_LINES and sum(map(len, sample)) < _SAMPLE_CHARACTERS:
        line = next(physical, None)
        if line is None:
            break
        sample.append(line)
    return sample


def _delimiter(name: str, sample: list[str], preferred: str) -> str:
    """The delimiter that the format says, unless only another one parts the file."""
    if _fits(sample, preferred):
        return preferred
    others = [one for one in _NAMES if one != preferred and _fits(sample, one)]
    if len(others) == 1:
        return others[0]
    header = sample[0] if sample else ""
    if preferred not in header:
        present = [_NAMES[one] for one in _NAMES if one in header]
        if present:
            raise DataError(
                f"{name} has no {_NAMES[preferred]} in its header, but {' and '.join(present)}, "
                "which do not part its rows evenly. Save it with commas and quotes."
            )
    return preferred


def _fits(sample: list[str], delimiter: str) -> bool:
    """Whether it divides the header, and most rows into as many fields."""
    header, *rows = _parted(sample, delimiter) or [[]]
    fitting = sum(len(row) == len(header) for row in rows)
    return len(header) > 1 and 2 * fitting >= len(rows)


def _parted(sample: list[str], delimiter: str) -> list[list[str]]:
    """Whole records of the sample, up to the first that is broken or goes on behind it."""
    records = []
    reader = csv.reader(sample, delimiter=delimiter, strict=True)
    with suppress(csv.Error):
        for record in reader:
            if record:
                records.append(record)
    return records


def _is_spaced(sample: list[str], delimiter: str) -> bool:
    """Whether a blank follows each delimiter of the header."""
    header = next(iter(_parted(sample, delimiter)), [])
    return len(header) > 1 and all(field.startswith(" ") for field in header[1:])


def _checked_names(name: str, number: int, names: list[str]) -> list[str]:
    """The names of the columns, those that have none called as pandas does, from 0."""
    if not any(names):
        raise DataError(f"{name}:{number} has a header without names.")
    repeated, count = Counter(filter(None, names)).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{name}:{number} names the column {repeated!r} {count} times in its header; "
            "give each its own name."
        )
    taken = set(names)
    return [given or _free_name(index, taken) for index, given in enumerate(names)]


def _free_name(index: int, taken: set[str]) -> str:
    name = f"{_UNNAMED}{index}"
    while name in taken:
        name += "."
    return name


def _row(name: str, number: int, header: list[str], fields: list[str]) -> Row | BadRow:
    if len(fields) != len(header):
        detail = f"{len(fields)}, the header has {len(header)}"
        return BadRow(name, number, "wrong number of fields", detail)
    if any("\0" in field for field in fields):
        return BadRow(name, number, NUL, "text has none; the file may be damaged")
    record = dict(zip(header, fields, strict=True))
    if "" in fields:
        record = {key: one for key, one in record.items() if one or not key.startswith(_UNNAMED)}
    return Row(name, number, record)


def _lines_lost(first: int, last: int) -> str:
    if first == last:
        return "within the line"
    return f"lines {first} to {last} are read as one, from a quote to the next"


def _is_unclosed(error: csv.Error) -> bool:
    return "unexpected end of data" in str(error) or "field larger" in str(error)


def _broken(name: str, number: int, error: csv.Error) -> DataError:
    if _is_unclosed(error):
        return DataError(
            f"{name}:{number} opens a quote that is never closed. Within quotes, a quote is "
            'written twice (""); the file may also be cut off.'
        )
    return DataError(f"{name}:{number} has a header that cannot be read: {error}.")
