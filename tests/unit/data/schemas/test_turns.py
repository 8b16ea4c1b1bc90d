"""Which roles may follow each other."""

from __future__ import annotations

import pytest

from qlora_kit.data.examples import Conversation

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
