"""Whatever a row holds, it is read or refused: nothing else happens."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from typing import Any, get_args

import pytest

from qlora_kit.data.schemas import SCHEMAS, Recogniser, content_key
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SchemaName

from .rows import Json, row, source

KEYS = sorted({key for schema in SCHEMAS.values() for key in schema.reads})
INNER = ("role", "content", "from", "value", "tool_calls", "function_call", "train", "weight",
         "reasoning", "name", "tool_call_id", "type", "text", "function", "arguments")  # fmt: skip
VALUES = (None, True, False, 0, 1, -5, 10**400, 0.5, float("nan"), "", " ", "hello", "\ud800", "\0",
          "\x1b[0m", "user", "gpt", "tool", "assistant", "function_call", "text", "true",
          '{"name": "f", "arguments": "{}"}', "[]", "[{}]", "{", "\u2028é", b"x")  # fmt: skip
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation")


def anything(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.random()
    if kind < 0.5 or depth > 4:
        return draw.choice(VALUES)
    if kind < 0.75:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {key: anything(draw, depth + 1) for key in draw.sample(INNER, draw.randrange(5))}


def sensible(draw: random.Random) -> Any:
    """What some schema may want, but for a fault here and there."""
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(("hello", "fine", "hello you"))
    if kind < 0.6:
        return draw.choice((True, False))
    turns: list[Json] = []
    for role in (*draw.choice(((), ("system",))), "user", draw.choice(("assistant", "gpt"))):
        turns.append({"role": role, "content": draw.choice(("hello", "fine"))})
        if draw.random() < 0.15:
            turns[-1][draw.choice(INNER)] = anything(draw)
        if draw.random() < 0.05:
            turns[-1]["role"] = draw.choice(ROLES)
    return turns[draw.choice((0, 0, 1, -1)) :][: draw.choice((1, 3, 3))]


@pytest.mark.parametrize("named", get_args(SchemaName))
def test_read_or_refused(named: SchemaName) -> None:
    draw = random.Random(named)
    schemas = list(SCHEMAS.values()) if named == "auto" else [SCHEMAS[named]]
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        schema = draw.choice(schemas)
        columns = {sorted(schema.reads)[0]: "prompt.0"} if draw.random() < 0.1 else {}
        recogniser = Recogniser(source(type=named, columns=columns))
        for _ in range(2):
            keys = [draw.choice(slot) for slot in schema.slots]
            keys += ["messages"] if schema.name == "kto" else []
            keys += draw.sample([*KEYS, "images", "context"], draw.choice((0, 0, 1, 2)))
            values = (draw.choice((sensible, sensible, sensible, anything))(draw) for _ in keys)
            outcomes[is_read(recogniser, dict(zip(keys, values, strict=True)))] += 1
    assert min(outcomes.values()) > 10


def is_read(recogniser: Recogniser, record: Json) -> bool:
    message = ""
    try:
        example = recogniser.recognise(row(record))
    except DataError as refused:
        message = str(refused)
    if message:
        assert message.isprintable()
        assert len(message) < 3000
        return False
    json.dumps(asdict(example), allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert len(content_key(example)) == 16
    assert recogniser.describe()
    return True
