"""Which schema a row has, that all rows have one, and what is said where they do not."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from qlora_kit.data.rows import RowRefused
from qlora_kit.data.schemas import NO_SCHEMA, SCHEMAS, Recogniser
from qlora_kit.errors import DataError
from qlora_kit.recipe.data import SchemaName

from .rows import ANSWER, ORIGIN, USER, Json, read, reason, row, source

NAN = float("nan")
TURNS = [USER, ANSWER]
PAIR = {"prompt": "hello", "chosen": "a", "rejected": "b"}


def schema_of(record: Json) -> SchemaName | None:
    recogniser = Recogniser(source())
    recogniser.recognise(row(record))
    return recogniser.schema


def stop(*records: Json, **fields: Any) -> str:
    """Why the last of the rows ends the reading."""
    recogniser = Recogniser(source(**fields))
    for number, record in enumerate(records[:-1], start=7):
        recogniser.recognise(row(record, number))
    with pytest.raises(DataError) as caught:
        recogniser.recognise(row(records[-1], 6 + len(records)))
    assert not isinstance(caught.value, RowRefused)
    return str(caught.value)


def test_every_schema_is_there() -> None:
    assert {"auto", *SCHEMAS} == set(get_args(SchemaName))


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({**PAIR, "messages": TURNS}, "preference"),
        ({**PAIR, "completion": "a", "label": True}, "preference"),
        ({**PAIR, "instruction": "hello", "output": "a"}, "preference"),
        ({"messages": TURNS, "label": True}, "kto"),
        ({"conversations": TURNS, "kto_tag": False}, "kto"),
        ({"instruction": "a", "output": "b", "label": True}, "kto"),
        ({"prompt": "a", "completion": "b", "label": "true"}, "kto"),
        ({"messages": TURNS, "label": "chat"}, "messages"),
        ({"messages": TURNS, "conversations": TURNS}, "messages"),
        ({"messages": TURNS, "prompt": "hello", "completion": "x", "text": "x"}, "messages"),
        ({"conversations": TURNS, "instruction": "a", "output": "b"}, "sharegpt"),
        ({"instruction": "a", "input": "x", "output": "b", "text": "c"}, "alpaca"),
        ({"instruction": "a", "output": "b", "category": "c"}, "alpaca"),
        ({"question": "a", "answer": "b", "category": "c", "text": "d"}, "prompt_completion"),
        ({"input": "a", "output": "b"}, "prompt_completion"),
        ({"text": "a", "label": True}, "label"),
        ({"text": "a", "category": "b", "title": "c"}, "label"),
        ({"text": "a", "title": "c"}, "text"),
    ],
)
def test_precedence(record: Json, schema: str) -> None:
    assert schema_of(record) == schema


@pytest.mark.parametrize(
    ("record", "schema"),
    [
        ({"messages": None, "conversations": TURNS}, "sharegpt"),
        ({"messages": None, "text": "a"}, "text"),
        ({"instruction": "a", "output": "b", "chosen": None, "rejected": None}, "alpaca"),
        ({"prompt": "a", "completion": "b", "messages": None}, "prompt_completion"),
        ({"text": "a", "messages": None, "conversations": None, "prompt": None}, "text"),
    ],
)
def test_a_null_is_absent(record: Json, schema: str) -> None:
    assert schema_of(record) == schema


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "a", "label": None}, "label is null"),
        ({"prompt": "a", "completion": "b", "label": None}, "label is null"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is null"),
        ({"input": "a", "output": "b", "instruction": None}, "instruction is null"),
        ({"messages": None}, "messages is null"),
        ({"instruction": None, "output": None}, "output is null"),
    ],
)
def test_a_null_makes_no_other_schema(record: Json, expected: str) -> None:
    """What was half an answer is not trained on as another whole."""
    assert reason(record) == expected


def test_a_null_names_no_schema() -> None:
    recogniser = Recogniser(source())
    for record in ({"text": "a", "label": None}, {"messages": None}):
        with pytest.raises(RowRefused):
            recogniser.recognise(row(record))
    assert recogniser.schema is None
    recogniser.recognise(row({"prompt": "a", "completion": "b"}))
    assert recogniser.schema == "prompt_completion"
    recogniser.recognise(row({"prompt": "a", "completion": "b", "instruction": None}))


def test_two_schemas() -> None:
    message = stop({"messages": TURNS, "id": 1}, {"messages": TURNS}, {"text": "a"})
    assert "rows.jsonl:7 is messages (messages of role/content): {messages: a list of 2" in message
    assert 'rows.jsonl:9 is text (plain text): {text: "a"}' in message
    assert "type: " not in message
    assert "type: text" in stop({"text": "a"}, {"text": "b", "label": "c"})
    assert "is kto" in stop({"messages": TURNS}, {"messages": TURNS, "label": True})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"prompt": "a", "completion": "b", "label": "sums"}, {"label": True}),
        ({"prompt": "a", "completion": "b", "kto_tag": "sums"}, {"kto_tag": True}),
        ({"messages": TURNS, "text": None}, {"messages": None, "text": "a"}),
    ],
)
def test_two_schemas_with_the_same_keys(first: Json, second: Json) -> None:
    """What the keys hold decides between them, in every row anew."""
    assert "two rows of one source have different schemas" in stop(
        first, first, {**first, **second}
    )


def test_a_null_of_another_schema() -> None:
    """An optional column that other sources use is none of this one's."""
    recogniser = Recogniser(source())
    recogniser.recognise(row({"messages": TURNS}))
    recogniser.recognise(row({"messages": TURNS, "label": None}))
    assert recogniser.schema == "messages"


def test_the_first_row_fits_none() -> None:
    message = stop({"Instruction": "a", "ouput": "b", "topic": None, "turns": [{"q": "a"}]})
    assert "rows.jsonl:7 has the keys Instruction, ouput, topic (null), turns" in message
    assert "Did you mean instruction by Instruction?" in message
    assert "Did you mean output by ouput?" in message
    assert "If the objects in 'turns' are the rows" in message
    assert "columns" in message
    assert all(name in message for name in SCHEMAS)
    assert "has the keys (none)" in stop({})
    odd: Json = {None: ["x"], "\x1b[31m": 1, "a\nb": 2}  # type: ignore[dict-item]
    assert stop(odd).isprintable()
    assert len(stop({f"texts {number}": [{}] for number in range(10_000)})) < 4000


def test_a_later_row_fits_none() -> None:
    recogniser = Recogniser(source())
    recogniser.recognise(row({"text": "a"}))
    for record in ({}, {"comment": "a"}, {"instruction": "a"}):
        with pytest.raises(RowRefused) as caught:
            recogniser.recognise(row(record, 8))
        assert caught.value.reason == NO_SCHEMA == "fits no schema"
    recogniser.recognise(row({"text": "b"}))


def test_a_named_schema() -> None:
    recogniser = Recogniser(source(type="alpaca"))
    assert recogniser.schema == "alpaca"
    recogniser.recognise(row({"instruction": "a", "output": "b", "messages": TURNS}))
    with pytest.raises(RowRefused, match=r"fits no schema \(alpaca needs output; keys: instruc"):
        recogniser.recognise(row({"instruction": "a", "text": "b"}))
    message = stop({"instruction": "a", "text": "b"}, type="alpaca")
    assert "rows.jsonl:7 has no output, which type: alpaca needs" in message
    assert "its keys are instruction, text" in message
    assert read({"text": "a", "label": "b"}, type="text") == read({"text": "a"})


def test_ignored_keys() -> None:
    recogniser = Recogniser(source())
    recogniser.recognise(row({"id": 1, "text": "a", "meta": None, "images": []}))
    recogniser.recognise(row({"id": 2, "text": "a", "meta": {}}))
    assert recogniser.ignored_keys == ("id", "meta")
    for number in range(3000):
        recogniser.recognise(row({f"key {number}": 1, "text": "a"}))
    assert len(recogniser.ignored_keys) == 100


@pytest.mark.parametrize(
    ("record", "fields", "described"),
    [
        ({"messages": TURNS}, {}, "messages: messages of role/content"),
        ({"conversations": TURNS}, {}, "sharegpt: conversations of from/value"),
        ({"text": "a"}, {}, "text: plain text"),
        ({"content": "a"}, {"type": "text"}, "text: plain text (content)"),
        ({"a": "b"}, {"columns": {"text": "a"}}, "text: plain text; text from a"),
    ],
)
def test_description(record: Json, fields: Json, described: str) -> None:
    recogniser = Recogniser(source(**fields))
    recogniser.recognise(row(record))
    assert recogniser.describe() == described


def test_no_row_yet() -> None:
    recogniser = Recogniser(source())
    assert (recogniser.schema, recogniser.describe()) == (None, "no row yet")
    assert Recogniser(source(type="kto")).describe().startswith("kto: ")


@pytest.mark.parametrize("key", ["image", "images", "video", "videos", "audio", "audios"])
def test_what_no_schema_reads(key: str) -> None:
    """The same keys are met again and again; each row is looked at for itself."""
    recogniser = Recogniser(source())
    for given, refused in ([], False), (["a"], True), ("", False), ("a.png", True), (None, False):
        record = {"messages": TURNS, key: given}
        if refused:
            with pytest.raises(RowRefused, match=f"{ORIGIN}: no place for {key}"):
                recogniser.recognise(row(record))
        else:
            recogniser.recognise(row(record))
    assert recogniser.ignored_keys == ()


@pytest.mark.parametrize(
    "first",
    [
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "completion": "b"},
        {"messages": [USER, ANSWER]},
        {"text": "a"},
    ],
)
@pytest.mark.parametrize("key", ["response", "completion", "answer", "target"])
def test_another_layout_that_is_no_schema(first: Json, key: str) -> None:
    """Not a bad row: the file is a mixture, and each half is shown."""
    recogniser = Recogniser(source())
    recogniser.recognise(row(first, 1))
    with pytest.raises(DataError) as caught:
        recogniser.recognise(row({"instruction": "a", key: "d"}, 2))
    assert not isinstance(caught.value, RowRefused)
    message = str(caught.value)
    assert "two rows of one source have different layouts" in message
    assert f'rows.jsonl:2 is not, and fits no other schema: {{instruction: "a", {key}' in message
    assert f"rows.jsonl:1 is {recogniser.schema}" in message


@pytest.mark.parametrize(
    "lacking",
    [
        {"instruction": "a"},
        {"instruction": "a", "response": None},
        {"instruction": "", "response": "a"},
        {"response": "a"},
        {"a": "b"},
    ],
)
def test_a_row_that_lacks_a_part_is_a_bad_row(lacking: Json) -> None:
    recogniser = Recogniser(source())
    recogniser.recognise(row({"instruction": "a", "output": "c"}, 1))
    with pytest.raises(RowRefused, match=NO_SCHEMA):
        recogniser.recognise(row(lacking, 2))


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "a", "output": "b", "score": NAN},
        {"instruction": "a", "output": "b", "input": NAN, "system": NAN, "context": NAN},
        {"instruction": "a", "output": "b", "meta": {"score": NAN, "of": [NAN]}},
    ],
)
def test_nan_is_null(record: Json) -> None:
    """Where nothing reads it, it is nothing to the row."""
    assert read(record) == read({"instruction": "a", "output": "b"})
    assert reason({"text": "a", "label": NAN}) == "label is null"
    assert reason({"instruction": "a", "output": NAN, "id": 1}) == "output is null"
