"""A column mapping finds what a row keeps elsewhere, and says where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.examples import Conversation, PlainText, PromptCompletion, Rated
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import Recogniser
from qlora_kit.errors import DataError

from .rows import ORIGIN, SAID_ANSWER, SAID_USER, USER, read, reason, row, source

SQUAD = {"q": "hello", "answers": {"text": ["fine", "well"], "start": [1, 2]}, "id": 5}
BY_PATH = {"instruction": "q", "output": "answers.text.0"}


def test_paths() -> None:
    expected = Conversation((SAID_USER, SAID_ANSWER), ORIGIN)
    assert read(SQUAD, columns=BY_PATH) == expected
    assert read({"a.b": "hello", "output": "fine"}, columns={"instruction": "a.b"}) == expected
    nested = {"rows": [[[USER]], [[USER, {"from": "gpt", "value": "fine"}]]]}
    assert read(nested, columns={"messages": "rows.1.0"}) == expected


def test_a_mapping_goes_before_what_else_is_there() -> None:
    """A schema reads every field of it, and a column that is used is not read otherwise."""
    record = {"messages": [USER], "images": ["a.png"], "a": "Q: ", "b": "A", "answer": "x"}
    columns = {"prompt": "a", "completion": "b"}
    assert reason(record, columns=columns) == "no place for images"
    columns["response"] = "images.0"
    assert read(record, columns=columns) == PromptCompletion("Q: ", "A", ORIGIN)
    rated = read({**record, "label": True}, columns=columns)
    assert rated == Rated(PromptCompletion("Q: ", "A", ORIGIN), True, ORIGIN)
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert read({"prompt": "A", "completion": "Q"}, columns=swapped) == PromptCompletion(
        "Q", "A", ORIGIN
    )


def test_a_mapping_completes_what_is_there() -> None:
    record = {"instruction": "hello", "output": "fine", "topic": "x"}
    example = read({**record, "sys": "be brief"}, columns={"system": "sys"})
    assert isinstance(example, Conversation)
    assert [message.role for message in example.messages] == ["system", "user", "assistant"]
    assert reason({**record, "sys": 5}, columns={"system": "sys"}) == "system is a number"


@pytest.mark.parametrize(
    ("record", "finds"),
    [
        ({"q": "hello"}, "output: answers.text.0 finds no 'answers'; the row has q"),
        ({"q": "hello", "answers": {}}, "finds no 'text'; answers has (none)"),
        ({"q": "hello", "answers": None}, "finds no 'text'; answers is null"),
        ({"q": "hello", "answers": {"text": []}}, "finds no '0'; answers.text is a list of 0"),
        ({"q": "hello", "answers": {"text": "fine"}}, "finds no '0'; answers.text is a text"),
        ({"answers": {"text": ["fine"]}}, "instruction: q finds no 'q'"),
    ],
)
def test_a_path_that_leads_nowhere(record: dict[str, Any], finds: str) -> None:
    with pytest.raises(DataError) as first:
        read(record, columns=BY_PATH)
    assert not isinstance(first.value, RowRefused)
    recogniser = Recogniser(source(columns=BY_PATH))
    recogniser.recognise(row(SQUAD))
    with pytest.raises(RowRefused) as later:
        recogniser.recognise(row(record, 8))
    assert later.value.reason == "a column path leads nowhere"
    assert finds in str(first.value)
    assert finds in str(later.value)


def test_a_path_that_leads_to_null() -> None:
    assert reason({**SQUAD, "answers": {"text": [None]}}, columns=BY_PATH) == "output is null"


def test_fields_that_no_schema_reads() -> None:
    with pytest.raises(DataError, match="fill 'mesages', which no schema reads; did you mean mess"):
        Recogniser(source(columns={"mesages": "a"}))
    with pytest.raises(
        DataError, match=r"fill 'output', which type: text does not read.*content, text"
    ):
        Recogniser(source(type="text", columns={"output": "a"}))
    assert read({"a": "b"}, type="text", columns={"text": "a"}) == PlainText("b", ORIGIN)


def test_fields_of_two_schemas() -> None:
    with pytest.raises(DataError, match="fill messages and text, which no schema reads tog"):
        Recogniser(source(columns={"messages": "a", "text": "b"}))
    with pytest.raises(DataError, match="fit no known schema") as caught:
        read({"title": "a"}, columns={"target": "title"})
    assert "Known: kto (" in str(caught.value)
    assert "messages (" not in str(caught.value)


def test_real_instructions(shared_data: Path) -> None:
    columns = {"instruction": "instruction", "input": "instances.0.input",
               "output": "instances.0.output"}  # fmt: skip
    for name in ("seed_tasks", "user_oriented_instructions"):
        recogniser = Recogniser(source(columns=columns))
        path = shared_data / "self-instruct" / f"{name}.jsonl"
        for record in map(json.loads, path.read_text("utf-8").splitlines()):
            example = recogniser.recognise(row(record))
            assert isinstance(example, Conversation)
            assert example.messages[1].content == record["instances"][0]["output"]
        assert recogniser.describe().endswith("output from instances.0.output")


def test_real_tools(shared_data: Path) -> None:
    recogniser = Recogniser(source(columns={"messages": "question.0", "tools": "function"}), False)
    for name in ("parallel", "simple_python"):
        path = shared_data / "bfcl" / f"BFCL_v4_{name}.json"
        for record in map(json.loads, path.read_text("utf-8").splitlines()):
            example = recogniser.recognise(row(record))
            assert isinstance(example, Conversation)
            assert example.messages[0].content == record["question"][0][0]["content"]
            assert [tool["function"] for tool in example.tools] == record["function"]
    assert recogniser.schema == "messages"
