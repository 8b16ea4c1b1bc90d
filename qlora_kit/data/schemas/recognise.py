"""From a row to what it means: the schema is recognised by the row's keys, or named.

Rules:
- Schemas are tried in the order of `SCHEMAS`, and the first that fits is taken: what says more
  about an answer goes before what says less. A column mapping decides where its fields alone
  fit a schema.
- A field that is null counts as absent, but not for making another schema of a row: with the
  keys `text` and `label`, a null label is a fault, and the row no plain text.
- All rows of a source have one schema.
- Keys that no schema reads are left aside, and can be listed; those that would change the
  meaning (images, sounds, tools, a context) refuse the row.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from qlora_kit.data.examples import AnyExample
from qlora_kit.data.rows import Record, Row, RowRefused
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
from qlora_kit.data.schemas.fields import Unfit, names, preview
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
_MOST_LAYOUTS = 1000
_MOST_IGNORED = 100


class Recogniser:
    """Reads the rows of one source.

    `needs_answer` is false where every token is trained on, so that a conversation without an
    answer is of use.

    Raises:
        DataError: the column mapping fills a field that is not there.
    """

    def __init__(self, source: SourceSpec, needs_answer: bool = True):
        self._path = source.path
        self._named = None if source.type == "auto" else SCHEMAS[source.type]
        self._columns = source.columns
        self._rules = Rules(needs_answer, frozenset(source.columns))
        self._first: tuple[Schema, Row] | None = None
        self._naming: list[str] = []
        self._layouts: dict[tuple[str, ...], tuple[Schema, list[str]]] = {}
        self._ignored: dict[str, None] = {}
        known = self._named.reads if self._named else _FIELDS
        columns.check_targets(source.path, source.columns, known)

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
            record, filled = row.record, row.record
            if self._columns:
                filled, record = columns.mapped(record, self._columns)
            schema, unread = self._layout(row, record, filled)
            if unread:
                refuse_unread(record, unread)
            return schema.read(record, origin, self._rules)
        except Unfit as fault:
            raise RowRefused(origin, fault.reason, fault.detail) from None

    def _layout(self, row: Row, record: Record, filled: Record) -> tuple[Schema, list[str]]:
        """The schema of a row, and its keys that would have to be read."""
        keys = tuple(record)
        known = self._layouts.get(keys)
        if known is not None and None not in record.values():
            return known
        ...
