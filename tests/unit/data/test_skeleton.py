"""One rendering for all conversations of the same roles gives what each by itself gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.mark import LossOn, Marked, mark
from qlora_kit.data.render import Rendering
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.sequences import TokenSequence
from qlora_kit.data.skeleton import mark_by_skeleton

from .formats import FORMATS, build, tokenizer_of

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
PIECES = ["a", "\n", " ", "fine", "12", "日本", "🙂", "assistant", "user\n", "e\u0301", "<|im_"]
CONTENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
TURNS = st.lists(st.tuples(CONTENTS, st.sampled_from([None, None, True, False])), max_size=6)
LOSSES: st.SearchStrategy[LossOn] = st.sampled_from(
    ["assistant", "last", "all", ("user",), ("user", "assistant")]
)


def talk(turns: list[tuple[str, bool | None]], system: str | None) -> Conversation:
    messages = [Message("system", system)] if system else []
    messages += [
        Message("assistant" if number % 2 else "user", content, train=train)
        for number, (content, train) in enumerate(turns)
    ]
    return Conversation(tuple(messages), "rows.jsonl:1")


def labelled(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn,
    marked: Marked | None = None,
) -> TokenSequence | RowRefused:
    rendering = Rendering([conversation], tokenizer, loss_on)
    if marked is not None:
        rendering._marked = [marked]
    rendering.encode()
    return rendering.label()[0]


@pytest.mark.parametrize("name", FORMATS)
@QUICK
@given(turns=TURNS, system=st.none() | CONTENTS, loss_on=LOSSES, num_given=st.sampled_from([0, 2]))
def test_text_and_labels_are_those_of_the_conversation_alone(
    name: str,
    turns: list[tuple[str, bool | None]],
    system: str | None,
    loss_on: LossOn,
    num_given: int,
) -> None:
    tokenizer = tokenizer_of(name)
    conversation = replace(talk(turns, system), num_given=num_given)
    quick = mark_by_skeleton(conversation, tokenizer, loss_on)
    if quick is None:
        return
    alone = mark(conversation, tokenizer, loss_on)
    assert quick.text == alone.text
    assert quick.notes == alone.notes
    if not quick.openings:
        assert quick.spans == alone.spans
    found = labelled(conversation, tokenizer, loss_on)
    by_offsets = labelled(conversation, tokenizer, loss_on, alone)
    if isinstance(found, RowRefused) or isinstance(by_offsets, RowRefused):
        assert str(found) == str(by_offsets)
    else:
        assert found == by_offsets


def test_it_is_used_where_it_can_be() -> None:
    """Otherwise the test above would compare nothing."""
    quick = mark_by_skeleton(
        talk([("hello", None), ("fine", None)], "be brief"), tokenizer_of("chatml"), "assistant"
    )
    assert quick is not None
    assert quick.openings == (2,)


@pytest.mark.parametrize(
    "conversation",
    [
        talk([("hello", None), (" ", None)], None),
        talk([("hello", None), ("a <|im_end|>", None)], None),
        Conversation((Message("user", "a"), Message("assistant", "b", reasoning="c")), "r:1"),
        Conversation((Message("user", "a"), Message("assistant", "b")), "r:1", tools=({"x": 1},)),
    ],
    ids=["blank", "spelled", "reasoning", "tools"],
)
def test_what_is_rendered_by_itself(conversation: Conversation) -> None:
    assert mark_by_skeleton(conversation, tokenizer_of("chatml"), "assistant") is None


def test_a_template_that_leaves_a_message_out_or_writes_it_twice() -> None:
    for body in (
        "{% if not loop.first %}{{ m.content }}{% endif %}",
        "{{ m.content + m.content }}",
    ):
        template = (
            "{% for m in messages %}<|im_start|>" + body + "<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>{% endif %}"
        )
        conversation = talk([("hello", None), ("fine", None)], None)
        assert mark_by_skeleton(conversation, build(template=template), "assistant") is None
