"""Tokens on both sides of a seam."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.encode import as_generated, decode, encode, encode_after, eos_id, with_bos
from qlora_kit.data.template import RowRefused
from qlora_kit.errors import DataError

from .formats import build, build_sentencepiece, tokenizer_of

ROUGH = st.text(alphabet="ab \n1é🙂", max_size=12)


def test_nothing_is_added() -> None:
    tokenizer = build_sentencepiece(None, adds_bos=True, adds_eos=True)
    assert len(tokenizer("hello")["input_ids"]) == len(encode(tokenizer, "hello")) + 2


@settings(deadline=None, derandomize=True)
@given(opening=ROUGH, rest=ROUGH)
def test_the_text_begins_with_the_tokens_of_its_opening(opening: str, rest: str) -> None:
    tokenizer = tokenizer_of("chatml")
    encoded, [prompt] = encode_after(tokenizer, opening + rest, [opening], "row")
    assert prompt == encode(tokenizer, opening)
    assert encoded.ids[: len(prompt)] == prompt
    assert decode(tokenizer, encoded.ids) == opening + rest


def test_a_text_stays_in_one_piece_where_it_can() -> None:
    tokenizer = build()
    encoded, _ = encode_after(tokenizer, "the fox, the dog", ["the fox,"], "row")
    assert encoded.pieces == ("the fox, the dog",)
    encoded, _ = encode_after(tokenizer, "the fox, the dog", ["the f"], "row")
    assert encoded.pieces == ("the f", "ox, the dog")


def test_a_seam_that_would_change_the_text_is_refused() -> None:
    with pytest.raises(RowRefused, match="row: the first token of an answer begins before it"):
        encode_after(build_sentencepiece(None), "hello", ["hel"], "row")


@pytest.mark.parametrize("opening", ["🙂", "🙂é the ", "x"])
def test_where_a_character_is(opening: str) -> None:
    """Several tokens share a character here, and pieces are counted through."""
    tokenizer = build()
    text = opening + "  é🙂 lamp<|im_end|>\n"
    encoded, _ = encode_after(tokenizer, text, [opening], "row")
    for character in range(len(text)):
        token = encoded.token_at(character)
        assert token is not None
        before = decode(tokenizer, encoded.ids[:token])
        assert text.startswith(before.rstrip("\ufffd"))
        assert len(before) <= character < len(decode(tokenizer, encoded.ids[: token + 4]))
        starts = encoded.token_from(character)
        assert starts == (token if before == text[:character] else None)
    assert encoded.token_at(len(text)) is None
    end = encoded.token_at(text.index("<|im_end|>") + 3)
    assert end is not None
    assert tokenizer.convert_ids_to_tokens(encoded.ids[end]) == "<|im_end|>"
    assert encoded.token_from(text.index("<|im_end|>") + 3) is None


@pytest.mark.parametrize("adds_eos", [True, False])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_where_the_tokenizer_adds_it(adds_bos: bool, adds_eos: bool) -> None:
    tokenizer = build_sentencepiece(None, adds_bos=adds_bos, adds_eos=adds_eos)
    bos = [tokenizer.bos_token_id]
    assert with_bos(tokenizer, [7, 8]) == (bos if adds_bos else []) + [7, 8]
    assert with_bos(tokenizer, [*bos, 7]) == [*bos, 7]
    assert with_bos(tokenizer, []) == (bos if adds_bos else [])


def test_no_bos() -> None:
    assert with_bos(build(bos=None), [7]) == [7]


def test_no_eos() -> None:
    assert eos_id(build()) == build().eos_token_id
    with pytest.raises(DataError, match="no end-of-sequence token"):
        eos_id(build(eos=None))


def test_a_text_as_a_model_writes_it() -> None:
    assert as_generated(build(), "  <|im_start|>fine 日 <|im_end|>\n") == "fine 日"
