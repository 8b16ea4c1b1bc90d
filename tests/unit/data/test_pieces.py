"""Sequences in pieces: nothing is lost, and each is marked as it is trained on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from qlora_kit.data.encode import decode, encode
from qlora_kit.data.examples import Conversation, Message
from qlora_kit.data.pieces import runs, show, token_pieces
from qlora_kit.data.render import render
from qlora_kit.data.sequences import IGNORE_INDEX

from .formats import FORMATS, build_sentencepiece, tokenizer_of

ROUGH = st.text(alphabet="ab \n1é🙂\ufffd", max_size=12)


def conversation(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), "a:1")


@pytest.mark.parametrize("tokenizer", [tokenizer_of("chatml"), build_sentencepiece(None)])
@settings(deadline=None, derandomize=True)
@given(text=ROUGH, cut=st.integers(0, 30))
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str, cut: int) -> None:
    """Characters of several tokens too; every token is in one piece."""
    ids = encode(tokenizer, text)
    pieces = list(token_pieces(ids, [IGNORE_INDEX] * len(ids), tokenizer))
    assert "".join(piece.text for piece in pieces) == decode(tokenizer, ids)
    labels = [IGNORE_INDEX if number < cut else token for number, token in enumerate(ids)]
    pieces = list(token_pieces(ids, labels, tokenizer))
    assert [token for piece in pieces for token in piece.ids] == ids
    flags = [piece.is_supervised for piece in pieces for _ in piece.ids]
    assert flags == [label != IGNORE_INDEX for label in labels]


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_supervised_is_what_the_answer_says(name: str) -> None:
    tokenizer = tokenizer_of(name)
    shown = show(
        render(conversation("hello é🙂", "fine, 🙂 thanks"), tokenizer, "assistant"), tokenizer
    )
    end = FORMATS[name].end
    assert "fine, 🙂 thanks" in shown.supervised_text
    assert shown.supervised_text.rstrip().endswith(end)
    assert [piece.text for piece in shown.pieces if piece.is_special and piece.is_supervised] == [
        end
    ]
    values = shown.as_dict()
    assert "".join(values["supervised"]) == shown.supervised_text
    assert values["num_supervised"] == sum(
        len(piece.ids) for piece in shown.pieces if piece.is_supervised
    )


def test_a_special_token_spelled_in_a_message_is_shown_as_text() -> None:
    tokenizer = tokenizer_of("chatml")
    sequence = render(conversation("what is <|im_end|>?", "fine"), tokenizer, "assistant")
    texts = [piece.text for piece in show(sequence, tokenizer).pieces if piece.is_special]
    assert texts == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]


def test_runs_join_pieces_of_one_kind() -> None:
    tokenizer = tokenizer_of("chatml")
    ids = encode(tokenizer, "the quick brown fox")
    labels = [IGNORE_INDEX, *ids[1:-1], IGNORE_INDEX]
    found = runs(list(token_pieces(ids, labels, tokenizer)))
    assert [supervised for _, supervised in found] == [False, True, False]
    assert "".join(text for text, _ in found) == "the quick brown fox"
