"""Checked access to the fields of a row. Nothing is converted, and nothing is guessed.

A fault is raised as `Unfit`, which knows no origin; the recogniser adds it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_kit.data.rows import Record

MAX_DEPTH = 100
"""Objects and lists in one another that tools and arguments may have; templates recurse, too."""

_SHOWN_CHARACTERS = 60


class Unfit(Exception):
    """What is wrong with a row: a `reason` that rows like it share, and its own `detail`."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(reason)


def kind(value: Any) -> str:
    """What a value is, in a word or two that all such values share."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bytes | bytearray | memoryview):
        return "binary data"
    return f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """The value for a message: short, and safe for any size, depth or content."""
    if isinstance(value, str):
        cut = value[:_SHOWN_CHARACTERS]
        text = json.dumps(cut, ensure_ascii=not cut.isprintable())
        return text if len(cut) == len(value) else f'{text[:-1]}…"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 200):
        return str(value)
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return f"an object of {names(value)}" if value else "an empty object"
    return kind(value)


def names(keys: Iterable[Any], most: int = 12) -> str:
    """Keys of a row as a list in a sentence."""
    listed = [_name(key) for key in keys]
    text = ", ".join(listed[:most]) or "(none)"
    return f"{text}, …" if len(listed) > most else text


def preview(record: Record) -> str:
    """A row on one line."""
    pairs = [f"{_name(key)}: {shown(value)}" for key, value in record.items()]
    return "{" + ", ".join(pairs[:8]) + (", …" if len(pairs) > 8 else "") + "}"


def is_filled(value: Any) -> bool:
    """Whether a field says anything; null, "", [] and {} do not."""
    return value is not None and value != "" and value != [] and value != {}


def is_sound(text: str) -> bool:
    """Whether no half of a surrogate pair is in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def sound_text(value: Any, field: str, where: str = "") -> str:
    """Text that may be empty. `field` is its name in reasons, `where` its place in the row.

    Raises:
        Unfit: it is no text, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise Unfit(f"{field} is {kind(value)}", _place(field, where, value))
    if not value.isascii():
        _refuse_half_pairs(value, where or field)
    return value


def full_text(value: Any, field: str, where: str = "") -> str:
    """Text with more than white space in it.

    Raises:
        Unfit: it has none, or see `sound_text`.
    """
    text = sound_text(value, field, where)
    if not text or text.isspace():
        raise Unfit(f"{field} is empty", where if where != field else "")
    return text


def optional_text(record: Record, key: str) -> str:
    """Text of a field that may be absent, null or blank; "" for these.

    Raises:
        Unfit: see `sound_text`.
    """
    value = record.get(key)
    if value is None:
        return ""
    text = sound_text(value, key)
    return "" if text.isspace() else text


def one_of(record: Record, keys: tuple[str, ...], mapped: frozenset[str], what: str) -> str:
    """The key under which the row keeps `what`; the one that a column mapping names comes first.

    Raises:
        Unfit: several are there, and none says which is meant.
    """
    for key in keys:
        if key in mapped:
            return key
    filled = [key for key in keys if is_filled(record.get(key))]
    if len(filled) > 1:
        detail = f"{' and '.join(filled)}; say which with columns: {{{keys[0]}: {filled[0]}}}"
        raise Unfit(f"several keys for {what}", detail)
    present = filled or [key for key in keys if key in record]
    return present[0] if present else keys[0]


def json_value(value: Any, field: str, depth: int = 0) -> Any:
    """A copy of a value as JSON has it, in which tuples are lists.

    Raises:
        Unfit: it is nested too deeply, or holds what JSON has not, or half a surrogate pair.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return sound_text(value, field)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Unfit(f"{field} hold {value}, which is not JSON")
        return value
    if depth == MAX_DEPTH:
        raise Unfit(f"{field} are nested too deeply", f"more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {
            sound_text(key, f"a key in {field}"): json_value(one, field, depth + 1)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [json_value(one, field, depth + 1) for one in value]
    raise Unfit(f"{field} hold {kind(value)}, which is not JSON")


def parsed(text: str, field: str, where: str) -> Any:
    """What a JSON text holds.

    Raises:
        Unfit: it is not JSON, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        detail = f"{where}: {error.msg} at character {error.pos}: {shown(text)}"
        raise Unfit(f"{field} are not JSON", detail) from None
    except RecursionError:
        raise Unfit(f"{field} are nested too deeply", where) from None
    except ValueError as error:  # NaN, a repeated key, or an integer of thousands of digits
        raise Unfit(f"{field} are not JSON", f"{where}: {error}") from None
    return json_value(value, field)


def first_filled(record: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of the keys that says anything."""
    return next((key for key in keys if is_filled(record.get(key))), None)


def _name(key: Any) -> str:
    name = str(key)[:_SHOWN_CHARACTERS]
    return name if name.isprintable() else ascii(name)


def _place(field: str, where: str, value: Any) -> str:
    return f"{where or field} is {shown(value)}" if value is not None else (where or "")


def _refuse_half_pairs(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unfit("half a surrogate pair", f"{where}, character {error.start}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("an object has a key twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
