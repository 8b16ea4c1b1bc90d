"""Tools in every form come out as the same list."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation

from .rows import ANSWER, USER, read, reason

BARE = {"name": "sum", "description": "Add.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": BARE}


def tools(given: Any, key: str = "tools") -> tuple[Any, ...]:
    example = read({"messages": [USER, ANSWER], key: given})
    assert isinstance(example, Conversation)
    return example.tools


@pytest.mark.parametrize(
    "given", [[TOOL], [BARE], json.dumps([TOOL]), json.dumps([BARE]), [json.dumps(TOOL)], (BARE,)]
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_forms(given: Any, key: str) -> None:
    assert tools(given, key) == (TOOL,)


@pytest.mark.parametrize("given", [None, [], "", " ", "[]", "null", {}])
def test_none(given: Any) -> None:
    assert tools(given) == ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("sum", "tools are not JSON"),
        (TOOL, "tools is an object"),
        (5, "tools is a number"),
        ([5], "a tool is a number"),
        ([{"description": "Add."}], "a tool without a name"),
        ([{"type": "function", "function": "sum"}], "a tool without a name"),
        ([{"name": ""}], "name of a tool is empty"),
        ([{**BARE, "default": float("nan")}], "tools hold nan, which is not JSON"),
        ([{**BARE, "default": b"x"}], "tools hold binary data, which is not JSON"),
        ([{**BARE, "\ud800": 1}], "half a surrogate pair"),
        ([{**BARE, 5: 1}], "a key in tools is a number"),
    ],
)
def test_faults(given: Any, expected: str) -> None:
    assert reason({"messages": [USER, ANSWER], "tools": given}) == expected


def test_both_keys() -> None:
    record = {"messages": [USER, ANSWER], "tools": [TOOL], "functions": [BARE]}
    assert reason(record) == "several keys for the tools"
    assert read({**record, "functions": []}) == read({**record, "functions": None})


def test_a_list_that_no_schema_reads() -> None:
    record = {"messages": [USER, ANSWER], "function": [BARE]}
    assert reason(record) == "no place for function"
    assert read({**record, "function": "greeting"}) == read({"messages": [USER, ANSWER]})
