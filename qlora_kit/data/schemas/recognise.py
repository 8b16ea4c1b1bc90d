"""From a row to what it means: the schema is recognised by the row's keys, or named.

Rules:
- Schemas are tried in the order of `SCHEMAS`, and the first that fits is taken: what says more
  about an answer goes before what says less. With a column mapping, those that read every
  field that it fills are tried.
- A field that is null counts as absent, but not for making another schema of a row: with the
  keys `text` and `label`, a null label is a fault, and the row no plain text.
- NaN is null: it is how tables of numbers write a missing value.
- All rows of a source have one schema: a row of another stops the run, and so does one that
  has a question and an answer under names that no schema joins (instruction and response); one
  that lacks either is a bad row.
- Keys that no schema reads are left aside, and can be listed; those that would change the
  meaning (images, sounds, tools, a context) refuse the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from qlora_kit.data.examples import AnyExample
from qlora_kit.data.rows import Record, Row, RowRefused, Unreadable
from qlora_kit.data.schemas import (
    alpaca,
    columns,
    completion,
    kto,
    label,
    messages,
    preference,
    sharegpt,
    text,
)
from qlora_kit.data.schemas.fields import Unfit, first_filled, names, preview
from qlora_kit.data.schemas.nulls import noted_nulls
from qlora_kit.data.schemas.schema import Rules, Schema, refuse_unread
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SchemaName, SourceSpec

SCHEMAS: dict[SchemaName, Schema] = {
    schema.name: schema
    for schema in (
        preference.SCHEMA,
        kto.SCHEMA,
        messages.SCHEMA,
        sharegpt.SCHEMA,
        alpaca.SCHEMA,
        completion.SCHEMA,
        label.SCHEMA,
        text.SCHEMA,
    )
}
"""In the order in which they are tried."""

NO_SCHEMA = "fits no schema"
_FIELDS = frozenset().union(*(schema.reads for schema in SCHEMAS.values()))
_NAMING = [key for schema in SCHEMAS.values() for slot in schema.slots for key in slot]
_MOST_LAYOUTS = 1000
_MOST_IGNORED = 100
_MOST_HINTS = 20
_ANSWER_OF_A_SERVER = frozenset({"error", "message", "detail", "status", "code"})


class Recogniser:
    """Reads the rows of one source.

    `needs_answer` is false where every token is trained on, so that a conversation without an
    answer is of use; `split_special_tokens` is what `data.split_special_tokens` says.

    Raises:
        DataError: the column mapping fills a field that is not there.
    """

    def __init__(
        self, source: SourceSpec, needs_answer: bool = True, split_special_tokens: bool = True
    ):
        self._named = None if source.type == "auto" else SCHEMAS[source.type]
        self._columns = source.columns
        self._rules = Rules(needs_answer, frozenset(source.columns), split_special_tokens)
        self._first: tuple[Schema, Row] | None = None
        self._naming: list[str] = []
        self._layouts: dict[tuple[str, ...], tuple[Schema, list[str]]] = {}
        self._ignored: dict[str, None] = {}
        known = self._named.reads if self._named else _FIELDS
        not_read = f"type: {source.type} does not read" if self._named else "no schema reads"
        columns.check_targets(source.path, source.columns, known, not_read)
        self._tried = [one for one in SCHEMAS.values() if one.reads.issuperset(source.columns)]
        if not self._tried:
            raise DataError(
                f"the columns of {source.path} fill {' and '.join(source.columns)}, which no "
                "schema reads together. Fill the fields of one schema."
            )

    @property
    def schema(self) -> SchemaName | None:
        """The schema of this source; None before its first row."""
        if self._named:
            return self._named.name
        return self._first[0].name if self._first else None

    @property
    def ignored_keys(self) -> tuple[str, ...]:
        """Keys of the rows so far that are not read, in the order of their first row."""
        return tuple(self._ignored)

    def describe(self) -> str:
        """The schema on one line, and the keys by which the row was known."""
        name = self.schema
        if name is None:
            return "no row yet"
        found = f" ({', '.join(self._naming)})" if self._naming else ""
        mapped = ", ".join(f"{field} from {path}" for field, path in self._columns.items())
        return f"{name}: {SCHEMAS[name].layout}{found}" + (f"; {mapped}" if mapped else "")

    def recognise(self, row: Row) -> AnyExample:
        """What the row means.

        Raises:
            RowRefused: this row is at fault.
            DataError: it is of another schema than the rows before it, or it is the first, and
                of none.
        """
        origin = row.origin
        try:
            record = self._mapped(row) if self._columns else row.record
            types = set(map(type, record.values()))
            if float in types:
                record = {key: None if value != value else value for key, value in record.items()}
            schema, unread = self._layout(row, record)
            if Unreadable in types:
                _refuse_unreadable(record, schema)
            if unread:
                refuse_unread(record, unread)
            return noted_nulls(schema.read(record, origin, self._rules), record, schema)
        except Unfit as fault:
            raise RowRefused(origin, fault.reason, fault.detail) from None

    def _mapped(self, row: Row) -> Record:
        try:
            return columns.mapped(row.record, self._columns)
        except Unfit as fault:
            if self._first is None:
                raise DataError(f"{row.origin}: {fault.reason}: {fault.detail}.") from None
            raise

    def _layout(self, row: Row, record: Record) -> tuple[Schema, list[str]]:
        """The schema of a row, and its keys that would have to be read."""
        keys = tuple(record)
        by_keys = "label" not in record and "kto_tag" not in record and None not in record.values()
        if by_keys:
            known = self._layouts.get(keys)
            if known is not None:
                return known
        schema = self._named_schema(row, record) if self._named else self._found(row, record)
        unread = schema.unread(keys)
        for key in keys:
            extra = key not in schema.reads and key not in unread and record[key] is not None
            if extra and len(self._ignored) < _MOST_IGNORED:
                self._ignored[key] = None
        if by_keys and len(self._layouts) < _MOST_LAYOUTS:
            self._layouts[keys] = schema, unread
        return schema, unread

    def _named_schema(self, row: Row, record: Record) -> Schema:
        assert self._named is not None
        missing = self._named.missing(record)
        if missing and self._first is None:
            raise DataError(_missing(row, self._named, missing))
        if missing:
            detail = f"{self._named.name} needs {' and '.join(missing)}; keys: {names(record)}"
            raise Unfit(NO_SCHEMA, detail)
        self._settle(self._named, row, record)
        return self._named

    def _found(self, row: Row, record: Record) -> Schema:
        """The schema by the keys, which is that of the rows before."""
        schema, by_nulls = _schema_of(record, self._tried)
        if schema is None:
            if self._first is None:
                raise DataError(_no_schema(row, record, self._tried))
            if _is_whole(record):
                raise DataError(_two_layouts(row, *self._first))
            raise Unfit(NO_SCHEMA, f"keys: {names(row.record)}")
        if self._first is None:
            if not by_nulls:
                self._settle(schema, row, record)
            return schema
        settled, first = self._first
        if schema is not settled and by_nulls and settled.fits(record, record):
            return settled
        if settled is kto.SCHEMA and schema in kto.BASES and not settled.missing(record):
            return settled
        if schema is not settled:
            raise DataError(_two_schemas(row, schema, first, settled))
        return schema

    def _settle(self, schema: Schema, row: Row, record: Record) -> None:
        if self._first is None:
            self._first = schema, row
            naming = schema.naming([key for key in record if record[key] is not None])
            if not all(key in schema.layout for key in naming):
                self._naming = naming


def _refuse_unreadable(record: Record, schema: Schema) -> None:
    """Raises Unfit where the schema reads a value that could not be read."""
    for key, value in record.items():
        if isinstance(value, Unreadable) and key in schema.reads:
            raise Unfit(value.reason, value.detail)


def _schema_of(record: Record, tried: Sequence[Schema]) -> tuple[Schema | None, bool]:
    """The schema that the keys fit, and whether it does only if a null counts as there."""
    present = [key for key in record if record[key] is not None]
    schema = next((one for one in tried if one.fits(record, present)), None)
    if len(present) == len(record):
        return schema, False
    with_nulls = next((one for one in tried if one.fits(record, record)), None)
    if with_nulls is None or with_nulls is schema:
        return schema, False
    if schema is None or with_nulls.reads.issuperset(schema.naming(present)):
        return with_nulls, True
    return schema, False


def _is_whole(record: Record) -> bool:
    """Whether a row that fits no schema has a question and an answer all the same."""
    asked = ("instruction", *completion.PROMPT_KEYS)
    return all(first_filled(record, keys) for keys in (asked, completion.COMPLETION_KEYS))


def _two_layouts(row: Row, settled: Schema, first: Row) -> str:
    return (
        f"two rows of one source have different layouts. {first.origin} is {settled.name} "
        f"({settled.layout}): {preview(first.record)}; {row.origin} is not, and fits no other "
        f"schema: {preview(row.record)}. Give each its own file, as a source of its own, and say "
        "with columns what the second calls otherwise."
    )


def _two_schemas(row: Row, schema: Schema, first: Row, settled: Schema) -> str:
    both = "" if settled.missing(row.record) else f"; or set type: {settled.name} for both"
    return (
        f"two rows of one source have different schemas. {first.origin} is {settled.name} "
        f"({settled.layout}): {preview(first.record)}; {row.origin} is {schema.name} "
        f"({schema.layout}): {preview(row.record)}. Give each its own file, as a source of its "
        f"own{both}."
    )


def _missing(row: Row, schema: Schema, missing: list[str]) -> str:
    return (
        f"{row.origin} has no {' and no '.join(missing)}, which type: {schema.name} needs "
        f"({schema.layout}); its keys are {names(row.record)}. Say where they are with columns: "
        f"{{{missing[0]}: …}}, or set another type."
    )


def _no_schema(row: Row, record: Record, tried: Sequence[Schema]) -> str:
    listed = [f"{key} (null)" if value is None else key for key, value in record.items()]
    message = (
        f"{row.origin} has the keys {names(sorted(map(str, listed)))}, which fit no known schema. "
    )
    message += "Known: " + "; ".join(
        f"{schema.name} ({' + '.join(slot[0] for slot in schema.slots)}: {schema.layout})"
        for schema in tried
    )
    message += ". Where a row keeps them under other names, say so with columns."
    if _ANSWER_OF_A_SERVER.issuperset(map(str, record)):
        message += " It looks like a server's error message and not like rows: download it anew."
    if row.number == 2 and row.source.lower().endswith((".csv", ".tsv")):
        message += " The first line is taken for the names of the columns; give the file one."
    for key, value in sorted(record.items(), key=lambda pair: str(pair[0]))[:_MOST_HINTS]:
        near = difflib.get_close_matches(str(key).lower()[:40], _NAMING, n=1, cutoff=0.8)
        if near and near[0] not in record:
            message += f" Did you mean {near[0]} by {key}?"
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            message += f" If the objects in {key!r} are the rows, make that list the file."
    return message
