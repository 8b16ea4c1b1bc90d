"""JSON as strictly as its standard, and refusals that say what an object does wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from json import JSONDecodeError, JSONDecoder
from typing import Any, NoReturn

from qlora_kit.data.rows import Record

MAX_NESTING = 100
"""Levels of lists and objects in a row; what handles rows later recurses, and must not fail."""


class Refusal(ValueError):
    """A value that is read, and cannot be used; `reason` is what values like it share."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Refusal("a key twice", f"an object has the key {shown(repeated)} more than once")
    return record


def _constant(name: str) -> NoReturn:
    raise Refusal("NaN or Infinity", f"{name} is no JSON number; leave the key out instead")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise Refusal("a number out of range", f"{shown(digits)} is too large")
    return value


def _int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise Refusal("a number out of range", f"an integer of {len(digits)} digits") from None


STRICT = JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
)
# Takes anything of the right form: to find where a refused value ends.
LENIENT = JSONDecoder(
    parse_constant=lambda _: None, parse_float=lambda _: None, parse_int=lambda _: None
)


def parse_line(line: str) -> Record:
    """The object on one line of JSON Lines.

    Raises:
        Refusal: it is not JSON, is no object, or holds what a row may not.
    """
    try:
        value = STRICT.decode(line)
    except JSONDecodeError as error:
        cut = "" if line.endswith("\n") else "; the file ends here and may be cut off"
        raise Refusal("not JSON", f"{error.msg} at column {error.pos + 1}{cut}") from None
    except RecursionError:
        raise too_deep() from None
    return as_record(value, line.count("[") + line.count("{"))


def as_record(value: Any, num_openings: int) -> Record:
    """The value itself, where it is an object that is not nested too deeply.

    `num_openings`, the brackets in its text, is at least its depth; few spare the walk.

    Raises:
        Refusal: it is another kind of value, or too deep.
    """
    if not isinstance(value, dict):
        raise Refusal("not an object", f'found {kind(value)}; a row is {{"key": value, …}}')
    if num_openings > MAX_NESTING and _is_deep(value):
        raise too_deep()
    return value


def too_deep() -> Refusal:
    return Refusal("nested too deeply", f"more than {MAX_NESTING} levels")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def kind(value: Any) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str):
        return f"the text {shown(value)}"
    return "a list" if isinstance(value, list) else json.dumps(value)


def shown(text: str) -> str:
    """A text in a message: quoted, escaped where it cannot be printed, and short."""
    return ascii(text[:37] + "...") if len(text) > 40 else ascii(text)
