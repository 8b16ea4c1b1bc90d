"""JSON as strictly as its standard, and refusals that say what an object does wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from json import JSONDecodeError, JSONDecoder
from typing import Any, NoReturn

from qlora_kit.data.rows import Record

NUL = "a NUL character"
NUL_ESCAPE = "\\u0000"

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
        begins = f"; it begins with {shown(line[:41])}" if error.pos == 0 else ""
        hint = why_not_json(line, error.pos, error.msg) or begins or cut
        raise Refusal("not JSON", f"{words(error)} at column {error.pos + 1}{hint}") from None
    except RecursionError:
        raise too_deep() from None
    return as_record(value, line.count("[") + line.count("{"), has_nul=NUL_ESCAPE in line)


def as_record(value: Any, num_openings: int, *, has_nul: bool) -> Record:
    """The value itself, where it is an object that is not nested too deeply.

    `num_openings`, the brackets in its text, is at least its depth; few spare the walk. So does
    `has_nul`, whether its text has what may stand for a NUL character.

    Raises:
        Refusal: it is another kind of value, or too deep.
    """
    if not isinstance(value, dict):
        twice = isinstance(value, str) and value.lstrip().startswith(("{", "["))
        hint = "it was made JSON twice" if twice else 'a row is {"key": value, …}'
        raise Refusal("not an object", f"found {kind(value)}; {hint}")
    if num_openings > MAX_NESTING and _is_deep(value):
        raise too_deep()
    if has_nul:
        refuse_nul(value)
    return value


def refuse_nul(value: Any) -> None:
    """Raise Refusal where a text in the value, or a key, has a NUL character."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str) and "\0" in one:
            raise Refusal(NUL, f"in {shown(one)}; text has none, the data may be damaged")
        if isinstance(one, dict):
            pending.extend(one)
            pending.extend(one.values())
        elif isinstance(one, list):
            pending.extend(one)


def why_not_json(text: str, at: int, message: str) -> str:
    """What is commonly wrong where text is not JSON, as the end of a sentence; often nothing."""
    here = text[at : at + 2]
    before = text[max(0, at - 100) : at].rstrip(" \t\r\n")[-1:]
    if here[:1] in ("]", "}") and before == ",":
        return f"; the comma before {here[0]} is one too many"
    if here[:1] == "'":
        return "; texts stand in double quotes, and this may be what Python prints"
    if here in ("//", "/*") or here[:1] == "#":
        return "; JSON has no comments"
    if here[:1] == "\0":
        return "; NUL characters stand there, and the file may be damaged"
    if text.startswith(("True", "False", "None"), at):
        return "; it is true, false or null in JSON, and this may be what Python prints"
    if message.startswith("Extra data"):
        return _what_follows(text, at)
    if message.startswith("Invalid control character"):
        return "; within a text, a line feed is written \\n and a tab \\t"
    return ""


def _what_follows(text: str, at: int) -> str:
    if text[at] == ",":
        return "; a comma stands behind the object, and a line has none"
    if text[at] in "{[":
        return "; another begins there, so divide the lines"
    return f"; found {shown(text[at : at + 40])}"


def words(error: JSONDecodeError) -> str:
    """What Python says of it, without the preposition for the place."""
    return error.msg.removesuffix(" at")


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
