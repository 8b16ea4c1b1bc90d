"""Rows, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_kit.data.examples import AnyExample, Message
from qlora_kit.data.rows import Row, RowRefused
from qlora_kit.data.schemas import Recogniser
from qlora_kit.recipe.data import SourceSpec

Json = dict[str, Any]

ORIGIN = "rows.jsonl:7"
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "fine"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"name": "sum", "arguments": {"of": [1, 2]}}

SAID_SYSTEM = Message("system", "be brief")
SAID_USER = Message("user", "hello")
SAID_ANSWER = Message("assistant", "fine")


def row(record: Json, number: int = 7) -> Row:
    return Row("rows.jsonl", number, record)


def source(**fields: Any) -> SourceSpec:
    return SourceSpec(path="rows.jsonl", **fields)


def read(record: Json, *, needs_answer: bool = True, **fields: Any) -> AnyExample:
    """The example of the only row of a source."""
    return Recogniser(source(**fields), needs_answer).recognise(row(record))


def refusal(record: Json, *, needs_answer: bool = True, **fields: Any) -> RowRefused:
    with pytest.raises(RowRefused) as caught:
        read(record, needs_answer=needs_answer, **fields)
    assert str(caught.value).startswith(ORIGIN)
    return caught.value


def reason(record: Json, **fields: Any) -> str:
    return refusal(record, **fields).reason
