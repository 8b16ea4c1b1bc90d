"""Tokenizers from GGUF metadata, against the splitting rules that the models publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from qlora_kit.errors import ModelError
from qlora_kit.model.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = {"ĠĠ": "Ġ Ġ", "12": "1 2", "123": "12 3", "he": "h e", "Ġhe": "Ġ he", "'s": "' s"}
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *WORDS, "<tool>"]
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4
NOWHERE = Path("model.gguf")


def metadata(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE tokenizer; `changes` by the last part of the key, None to leave one out."""
    normal = [NORMAL] * (len(TOKENS) - len(SPECIAL) - 1)
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": [CONTROL] * len(SPECIAL) + normal + [USER_DEFINED],
        "merges": list(WORDS.values()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    stated = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return {"general.architecture": "llama", "llama.context_length": 64, **stated}


def pieces(text: str, **changes: Any) -> list[str]:
    tokenizer, _ = build_tokenizer(NOWHERE, metadata(**changes))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "a  12", ["a", "Ġ", "Ġ", "12"]),
        ("gpt-2", "123", ["123"]),
        ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
        ("starcoder", "\n  1", ["Ċ", "ĠĠ", "1"]),
        ("llama-bpe", "  123123", ["Ġ", "Ġ", "123", "123"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("qwen2", "  \n12", ["ĠĠ", "Ċ", "1", "2"]),
        ("qwen2", "'She", ["'", "S", "he"]),
        ("tekken", "'s12", ["'s", "1", "2"]),
    ],
)
def test_text_is_split_as_the_original_splits_it(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(text, pre=pre) == expected


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_rule_gives_the_text_back(pre: str) -> None:
    tokenizer, warnings = build_tokenizer(NOWHERE, metadata(pre=pre, add_bos_token=False))
    for text in (
        "  it 's 12 , ok ? ",
        "\n\n\t1\r\n",
        "日本 é 😀 ١٢",
        "DON'T he's",
        "<tool> x<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.clean_up_tokenization_spaces is False
    assert warnings == ["the file carries no chat template"]


def test_one_character_however_it_is_written() -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    assert pieces(decomposed, pre="qwen2") == pieces(composed, pre="qwen2")
    assert pieces(decomposed, pre="smollm") != pieces(composed, pre="smollm")


def test_words_of_the_vocabulary_need_no_merges_where_the_model_says_so() -> None:
    reachable = [merge for merge in WORDS.values() if merge != "12 3"]
    assert pieces("123", pre="llama-bpe", merges=reachable) == ["123"]
    assert pieces("123", pre="gpt-2", merges=reachable) == ["12", "3"]


def test_special_tokens_stay_whole_and_are_special() -> None:
    tokenizer, _ = build_tokenizer(NOWHERE, metadata())
    ids = tokenizer("<|im_start|>he<tool><|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "he", "<tool>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<tool>"
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert named == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "<|endoftext|>"),
        ({"padding_token_id": 1}, "<|im_start|>"),
        ({"padding_token_id": None}, "<|endoftext|>"),
        ({"eos_token_id": 0, "padding_token_id": 0}, None),
    ],
)
def test_padding_is_never_the_end(changes: dict[str, Any], expected: str | None) -> None:
    tokenizer, warnings = build_tokenizer(NOWHERE, metadata(**changes))
    assert tokenizer.pad_token == expected
    assert any("pad_token" in warning for warning in warnings) == (expected is None)


@pytest.mark.parametrize(
    ("changes", "prepended"),
    [
        ({"pre": "smollm"}, False),
        ({"pre": "smollm", "add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "llama-bpe", "bos_token_id": None}, False),
    ],
)
def test_bos_is_prepended_only_where_the_model_wants_it(
    tmp_path: Path, changes: dict[str, Any], prepended: bool
) -> None:
    tokenizer, _ = build_tokenizer(NOWHERE, metadata(**changes))
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        bos = ["<|im_start|>"] if prepended else []
        assert each.convert_ids_to_tokens(each("he").input_ids) == [*bos, "he"]


def test_an_unknown_rule_is_warned_about() -> None:
    tokenizer, warnings = build_tokenizer(NOWHERE, metadata(pre="brand-new"))
    assert any("'brand-new' is not known here" in warning for warning in warnings)
    assert tokenizer.convert_ids_to_tokens(tokenizer("123").input_ids) == ["123"]


def test_a_file_without_a_vocabulary() -> None:
    with pytest.raises(ModelError, match=r"model\.gguf carries no tokenizer"):
        build_tokenizer(NOWHERE, metadata(tokens=None))


@pytest.mark.parametrize("merge", ["x yz", "nonsense"])
def test_merges_that_contradict_the_vocabulary(merge: str) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf is damaged: its tokenizer merges"):
        build_tokenizer(NOWHERE, metadata(merges=[merge]))


def test_sentencepiece_is_left_to_transformers_but_for_the_special_tokens(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "h", "i", "hi", "▁hi", "1"]
    path = tmp_path / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 6)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    tokenizer, warnings = build_tokenizer(path, fields)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hi hi1").input_ids) == [
        "<s>",
        "▁hi",
        "▁hi",
        "1",
    ]
    assert tokenizer.decode(tokenizer("hi é").input_ids, skip_special_tokens=True) == "hi é"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert "transformers' conversion, unchecked" in warnings[0]
