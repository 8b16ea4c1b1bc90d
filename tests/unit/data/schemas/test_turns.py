"""Which roles may follow each other."""

from __future__ import annotations

import pytest

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.schemas.fields import Unfit
from qlora_kit.data.schemas.turns import check_order

from .rows import read, reason

TURNS = {
    "s": {"role": "system", "content": "be brief"},
    "u": {"role": "user", "content": "hello"},
    "a": {"role": "assistant", "content": "fine"},
    "c": {"role": "assistant", "content": None, "tool_calls": [{"name": "sum"}]},
    "t": {"role": "tool", "content": "3"},
}


def record(turns: str, key: str = "messages") -> dict[str, object]:
    return {key: [TURNS[turn] for turn in turns]}


@pytest.mark.parametrize(
    "turns", ["ua", "sua", "uaua", "uc", "ucta", "uctta", "uctcta", "uctaua", "ucua", "suctuca"[:6]]
)
def test_in_order(turns: str) -> None:
    for key in ("messages", "conversations"):
        example = read(record(turns, key))
        assert isinstance(example, Conversation)
        assert [message.role[0] for message in example.messages] == [
            "a" if turn == "c" else turn for turn in turns
        ]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("uua", "two user turns in a row"),
        ("uaa", "two assistant turns in a row"),
        ("uca", "two assistant turns in a row"),
        ("ssua", "a system turn after the start"),
        ("usa", "a system turn after the start"),
        ("uas", "a system turn after the start"),
        ("uta", "a tool result without a call"),
        ("tua", "a tool result without a call"),
        ("uatua", "a tool result without a call"),
        ("uau", "ends with a user turn"),
        ("uct", "ends with a tool turn"),
        ("u", "no answer"),
        ("s", "no answer"),
        ("su", "no answer"),
        ("a", "begins with an assistant turn"),
        ("sa", "begins with an assistant turn"),
    ],
)
def test_out_of_order(turns: str, expected: str) -> None:
    for key in ("messages", "conversations"):
        assert reason(record(turns, key)) == expected


def test_who_begins() -> None:
    """Only ShareGPT rows may begin with a greeting, which is context."""
    for turns in ("aua", "saua"):
        assert reason(record(turns)) == "begins with an assistant turn"
        example = read(record(turns, "conversations"))
        assert isinstance(example, Conversation)
        assert [turn.train for turn in example.messages if turn.role == "assistant"] == [
            False,
            None,
        ]
    assert reason(record("au", "conversations")) == "ends with a user turn"


@pytest.mark.parametrize("turns", ["u", "su", "s", "uau", "uct", "ua"])
def test_all_is_trained_on(turns: str) -> None:
    """Without an answer there is something to learn where every token is trained on."""
    example = read(record(turns), needs_answer=False)
    assert isinstance(example, Conversation)
    assert len(example.messages) == len(turns)
    assert reason(record("uu"), needs_answer=False) == "two user turns in a row"


SPELLED = (
    '<tool_call>\n{"name": "sum", "arguments": {"of": [1, 2]}}\n</tool_call>',
    'Let me see.<function=sum>{"of": [1, 2]}</function>',
    '<|python_tag|>{"name": "sum", "parameters": {"of": [1, 2]}}',
    '[TOOL_CALLS] [{"name": "sum", "arguments": {"of": [1, 2]}}]',
)


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_call_spelled_in_the_text_of_a_turn(spelled: str) -> None:
    """As Hermes writes its rows: the text stays as it is, and results may follow it."""
    turns = [
        Message("user", "1 + 2"),
        Message("assistant", spelled),
        Message("tool", "3"),
        Message("tool", "3"),
        Message("assistant", "It is 3."),
    ]
    check_order(turns)
    rows = [{"from": turn.role, "value": turn.content} for turn in turns]
    example = read({"conversations": rows})
    assert isinstance(example, Conversation)
    assert list(example.messages) == turns


@pytest.mark.parametrize("spelled", SPELLED)
def test_a_call_that_a_user_spells_is_none(spelled: str) -> None:
    turns = [Message("user", spelled), Message("tool", "3"), Message("assistant", "It is 3.")]
    with pytest.raises(Unfit, match="a tool result without a call"):
        check_order(turns)
