"""A row of a source, and one that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import DataError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One record and its origin: `number` is the line in a file, else the row, from 1."""

    source: str
    number: int
    record: Record

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.number}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A value of a table that rows cannot have. It is at fault where a schema reads its column."""

    reason: str
    detail: str

    def __str__(self) -> str:
        return f"({self.detail})"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read. `reason` is what rows like it share, `detail` its own."""

    source: str
    number: int
    reason: str
    detail: str = ""

    @property
    def origin(self) -> str:
        return f"{self.source}:{self.number}"


class RowRefused(DataError):
    """One row that cannot be used as it stands; `reason` is what rows like it share."""

    def __init__(self, origin: str, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{origin}: {reason}{f' ({detail})' if detail else ''}.")
