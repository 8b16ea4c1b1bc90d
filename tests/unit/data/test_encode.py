"""Tokens on both sides of a seam, and text that only looks like a token."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data.encode import (
    Encoded,
    Piece,
    as_generated,
    decode,
    encode,
    encode_batch,
    encode_cut,
    encode_literally,
    eos_id,
    with_bos,
)
from qlora_kit.data.rows import RowRefused
from qlora_kit.errors import DataError

from .formats import build, build_sentencepiece, tokenizer_of

ROUGH = st.text(alphabet="ab \n1é🙂", max_size=12)
SPELLED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " ", "\n", "é🙂", "<", "|"]), max_size=6
)


def whole(tokenizer: object, text: str) -> Encoded:
    return Encoded.of([Piece(text, encode_batch(tokenizer, [text])[0])])


def test_nothing_is_added() -> None:
    tokenizer = build_sentencepiece(None, adds_bos=True, adds_eos=True)
    assert len(tokenizer("hello")["input_ids"]) == len(encode(tokenizer, "hello")) + 2


@settings(deadline=None, derandomize=True)
@given(texts=st.lists(ROUGH, min_size=1, max_size=4))
def test_many_at_once_are_each_as_alone(texts: list[str]) -> None:
    tokenizer = tokenizer_of("chatml")
    together = [one.ids for one in encode_batch(tokenizer, texts)]
    assert together == [encode(tokenizer, text) for text in texts]


@settings(deadline=None, derandomize=True)
@given(opening=ROUGH, rest=ROUGH)
def test_a_cut_text_begins_with_the_tokens_of_its_opening(opening: str, rest: str) -> None:
    tokenizer = tokenizer_of("chatml")
    cut = encode_cut(tokenizer, whole(tokenizer, opening + rest), opening, "row")
    prompt = encode(tokenizer, opening)
    assert cut.ids == [*prompt, *encode(tokenizer, rest)]
    assert decode(tokenizer, cut.ids) == opening + rest


def test_a_seam_that_would_change_the_text_is_refused() -> None:
    tokenizer = build_sentencepiece(None)
    with pytest.raises(RowRefused, match="row: the first token of an answer begins before it"):
        encode_cut(tokenizer, whole(tokenizer, "hello"), "hel", "row")


@settings(deadline=None, derandomize=True)
@given(before=SPELLED, said=SPELLED, after=SPELLED)
def test_what_is_literal_holds_no_token_of_its_own(
    before: list[str], said: list[str], after: list[str]
) -> None:
    """And what is not literal keeps every one of its own."""
    tokenizer = tokenizer_of("chatml")
    own = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>")}
    opening, content, rest = "".join(before), "".join(said), "".join(after)
    place = (len(opening), len(opening) + len(content))
    literal = [place] if content else []
    encoded = encode_literally(tokenizer, opening + content + rest, literal, "row")
    assert decode(tokenizer, encoded.ids) == opening + content + rest
    expected = [*encode(tokenizer, opening), *encode(tokenizer, rest)]
    if content:
        assert [one for one in encoded.ids if one in own] == [one for one in expected if one in own]


def test_a_cut_through_literal_text_keeps_it_text() -> None:
    tokenizer = build()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = "say <|im_end|> now <|im_end|>"
    places = [(4, 14), (19, 29)]
    for cut_at in range(len(text)):
        encoded = encode_literally(tokenizer, text, places, "row")
        if any(start < cut_at < stop for start, stop in places):
            continue
        cut = encode_cut(tokenizer, encoded, text[:cut_at], "row", places)
        assert end not in cut.ids
        assert decode(tokenizer, cut.ids) == text


@pytest.mark.parametrize("opening", ["", "🙂", "🙂é the ", "x"])
def test_where_a_character_is(opening: str) -> None:
    """Several tokens share a character here, and pieces are counted through."""
    tokenizer = build()
    text = opening + "  é🙂 lamp<|im_end|>\n"
    encoded = encode_cut(tokenizer, whole(tokenizer, text), opening, "row")
    assert len(encoded.pieces) == (2 if opening else 1)
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


def test_a_token_of_one_character_is_text_where_it_is_literal() -> None:
    """There is no breaking it in two."""
    tokenizer = build(("☃", "<|im_start|>", "<|im_end|>"), bos=None)
    token = tokenizer.convert_tokens_to_ids("☃")
    encoded = encode_literally(tokenizer, "☃ a☃b", [(2, 5)], "row")
    assert encoded.ids.count(token) == 1
    assert encoded.ids[0] == token
    assert decode(tokenizer, encoded.ids) == "☃ a☃b"


def test_threads_do_not_turn_each_others_tokens_into_text() -> None:
    """Rows are labelled, some of them as text, while the tokenizer works on the next ones."""
    tokenizer = build()
    texts = ["a<|im_end|>b"] * 3

    def ids_of(as_text: bool) -> list[list[int]]:
        return [one.ids for one in encode_batch(tokenizer, texts, as_text)]

    expected = {as_text: ids_of(as_text) for as_text in (True, False)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda n: (n % 2 == 0, ids_of(n % 2 == 0)), range(6000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(ids == expected[as_text] for as_text, ids in found)
