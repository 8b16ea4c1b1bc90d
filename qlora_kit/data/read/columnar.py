"""Rows of Parquet and Arrow files, batch by batch through the memory map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_kit.data.read.opened import SourceFile, unpacked_file
from qlora_kit.data.read.strict_json import MAX_NESTING, Refusal, refuse_nul, shown, too_deep
from qlora_kit.data.rows import BadRow, Record, Row, Unreadable
from qlora_kit.errors import DataError

_BATCH_BYTES = 1 << 22
_MAX_BATCH_ROWS = 1024

# What pyarrow raises over bytes that are damaged, and over values that Python has no like of.
_ARROW_FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError, TypeError, KeyError)


def columnar_rows(file: SourceFile) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, or of an Arrow file or stream, counted from 1.

    Within a value, a null counts as a key that is absent: structs have a place for every key that
    any row has. A column that is null stays, as it does in JSON: the schema tells what it means.

    Raises:
        DataError: the file cannot be opened, is damaged, or names a column twice.
    """
    number = 0
    with unpacked_file(file) as opened:
        batches = _parquet_batches(opened) if file.format == "parquet" else _arrow_batches(opened)
        while True:
            batch = _next_batch(file, batches, number)
            if batch is None:
                return
            step = _rows_at_once(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, step):
                for row in _rows(file.name, number, batch.slice(start, step)):
                    number += 1
                    yield row


def _next_batch(
    file: SourceFile, batches: Iterator[pa.RecordBatch], num_rows: int
) -> pa.RecordBatch | None:
    try:
        batch = next(batches, None)
        if batch is not None:
            # Offsets that point outside would crash the process, not raise.
            batch.validate(full=True)
    except _ARROW_FAULTS as error:
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{file.name} is damaged or cut off: {file.format} data cannot be read behind row "
            f"{num_rows} ({words}). Fetch or write it again."
        ) from None
    if batch is not None:
        repeated = [name for name, count in Counter(batch.schema.names).items() if count > 1]
        if repeated:
            raise DataError(f"{file.name} has more than one column {repeated[0]!r}; rename one.")
    return batch


def _parquet_batches(opened: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(opened, page_checksum_verification=True) as parquet:
        for group in range(parquet.num_row_groups):
            about = parquet.metadata.row_group(group)
            step = _rows_at_once(about.total_byte_size, about.num_rows)
            yield from parquet.iter_batches(step, row_groups=[group], use_threads=False)


def _arrow_batches(opened: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    magic = opened.read(6)
    opened.seek(0)
    if magic == b"ARROW1":
        with pa.ipc.open_file(opened) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
    else:
        with pa.ipc.open_stream(opened) as stream:
            yield from stream


def _rows_at_once(num_bytes: int, num_rows: int) -> int:
    return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * num_rows // max(1, num_bytes)))


def _rows(name: str, before: int, batch: pa.RecordBatch) -> Iterator[Row | BadRow]:
    try:
        records = batch.to_pylist()
    except _ARROW_FAULTS as error:
        if batch.num_rows == 1:
            detail = " ".join(str(error).split())[:200]
            yield BadRow(name, before + 1, "a value that cannot be read", detail)
            return
        for index in range(batch.num_rows):
            yield from _rows(name, before + index, batch.slice(index, 1))
        return
    for number, record in enumerate(records, start=before + 1):
        try:
            yield Row(name, number, plain_record(record))
        except Refusal as refusal:
            yield BadRow(name, number, refusal.reason, refusal.detail)


def plain_record(record: Record) -> Record:
    """A record of Arrow's Python values as JSON would have it, without the nulls in its values.

    Times become ISO 8601 text, and decimals their digits as text. A column that is binary, NaN,
    infinite, has a NUL character, or is of a kind that rows do not have, is Unreadable.
    """
    plain: Record = {}
    for key, value in record.items():
        try:
            plain[key] = _plain(value, 1)
        except Refusal as refusal:
            detail = f"column {shown(key)}: {refusal.detail}"
            plain[key] = Unreadable(refusal.reason, detail)
    return plain


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            refuse_nul(value)
        return value
    if value is None or isinstance(value, (bool, int)):
        return value
    if depth == MAX_NESTING and isinstance(value, (dict, list)):
        raise too_deep()
    if isinstance(value, dict):
        inner = {key: one for key, one in value.items() if one is not None}
        return {key: _plain(one, depth + 1) for key, one in inner.items()}
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) for one in value):
            return _plain(_mapping(value), depth)
        return [_plain(one, depth + 1) for one in value]
    return _plain_scalar(value)


def _plain_scalar(value: Any) -> str | float:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Refusal("NaN or Infinity", f"{value} is no value of JSON; write null instead")
        return value
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise Refusal("a binary value", f"{len(value)} bytes; decode them to text")
    raise Refusal("a value that is no text, number or object", type(value).__name__)


def _mapping(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """An Arrow map, whose keys must be texts that differ."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise Refusal("a key twice", "a map has a key more than once")
    if not all(isinstance(key, str) for key in mapping):
        raise Refusal("a key that is no text", "in a map")
    return mapping
