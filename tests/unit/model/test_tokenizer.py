"""The tokenizer ready to train with: what pads and why, what stops, and what its hash is of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import build_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qlora_kit.errors import ModelError
from qlora_kit.model.tokenizer import (
    PadChoice,
    _hash_of,
    ensure_padding,
    load_tokenizer,
    set_template_values,
    stop_ids,
    template_hash,
    tokenizer_hash,
    writes_the_date,
)

WORDS = ["<eos>", "hello", "world", "user", "assistant"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


def small(
    *more: str, added: tuple[str, ...] = (), template: str | None = TEMPLATE, **named: Any
) -> PreTrainedTokenizerFast:
    """Whole words; `more` are words of the vocabulary, `added` special tokens beside it."""
    words = {word: i for i, word in enumerate([*WORDS, *more])}
    backend = Tokenizer(models.WordLevel(words, unk_token=named.get("unk_token")))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    if added:
        tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


NONE = "the tokenizer names none"
IS_END = "the tokenizer's own is the end token"
IN_TEMPLATE = "the tokenizer's own stands in its template"

CHOICES: dict[str, tuple[Callable[[], PreTrainedTokenizerBase], PadChoice]] = {
    "its own": (
        lambda: small("<pad>", eos_token="<eos>", pad_token="<pad>"),
        PadChoice("<pad>", "the tokenizer's own"),
    ),
    "its own, although another is better known": (
        lambda: small("[PAD]", "<|endoftext|>", eos_token="<eos>", pad_token="<|endoftext|>"),
        PadChoice("<|endoftext|>", "the tokenizer's own"),
    ),
    "its own is the end": (
        lambda: small("<pad>", eos_token="<eos>", pad_token="<eos>"),
        PadChoice("<pad>", IS_END),
    ),
    "its own is written by the template": (
        lambda: small(
            "<pad>", "<sep>", eos_token="<eos>", pad_token="<sep>", template=TEMPLATE + "<sep>"
        ),
        PadChoice("<pad>", IN_TEMPLATE),
    ),
    "none, the best known first": (
        lambda: small("<|endoftext|>", "<|finetune_right_pad_id|>", eos_token="<eos>"),
        PadChoice("<|finetune_right_pad_id|>", NONE),
    ),
    "none, and the best known is the end": (
        lambda: small("<|endoftext|>", added=("<|reserved_1|>",), eos_token="<|endoftext|>"),
        PadChoice("<|reserved_1|>", NONE),
    ),
    "none, and the best known is in the template": (
        lambda: small("<|endoftext|>", "[PAD]", eos_token="<eos>", template=TEMPLATE + "[PAD]"),
        PadChoice("<|endoftext|>", NONE),
    ),
    "reserved, the first by its id": (
        lambda: small(
            added=("<tool>", "<|reserved_special_token_7|>", "<|reserved_special_token_2|>"),
            eos_token="<eos>",
        ),
        PadChoice("<|reserved_special_token_7|>", NONE),
    ),
    "unused": (
        lambda: small(added=("<unused0>",), eos_token="<eos>"),
        PadChoice("<unused0>", NONE),
    ),
    "extra": (
        lambda: small(added=("<extra_id_3>",), eos_token="<eos>"),
        PadChoice("<extra_id_3>", NONE),
    ),
    "vision's pad": (
        lambda: small(added=("<|vision_pad|>",), eos_token="<eos>"),
        PadChoice("<|vision_pad|>", NONE),
    ),
    "unknown": (
        lambda: small("<unk>", "<s>", eos_token="<eos>", unk_token="<unk>", bos_token="<s>"),
        PadChoice("<unk>", NONE),
    ),
    "unknown is the end, so the start": (
        lambda: small("<s>", eos_token="<eos>", unk_token="<eos>", bos_token="<s>"),
        PadChoice("<s>", NONE),
    ),
    "the template writes the start by its role": (
        lambda: small(
            "<unk>",
            "<s>",
            eos_token="<eos>",
            unk_token="<unk>",
            bos_token="<s>",
            pad_token="<s>",
            template="{{ bos_token }}" + TEMPLATE,
        ),
        PadChoice("<unk>", IN_TEMPLATE),
    ),
    "without a template": (
        lambda: small("<s>", eos_token="<eos>", bos_token="<s>", template=None),
        PadChoice("<s>", NONE),
    ),
    "without an end": (lambda: small("<s>", bos_token="<s>"), PadChoice("<s>", NONE)),
}


class TestPadding:
    @pytest.mark.parametrize("name", CHOICES)
    def test_the_choice_and_its_reason(self, name: str) -> None:
        make, expected = CHOICES[name]
        tokenizer = make()
        size = len(tokenizer)
        assert ensure_padding(tokenizer, num_embeddings=size + 9) == expected
        assert tokenizer.pad_token == expected.token
        assert tokenizer.pad_token_id is not None
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        assert len(tokenizer) == size, "a token was added although there was one to spare"
        assert ensure_padding(tokenizer).token == expected.token, "asked again, it changed its mind"

    @pytest.mark.parametrize("own", [None, "<eos>"])
    def test_one_is_added_where_the_model_has_embeddings_to_spare(self, own: str | None) -> None:
        tokenizer = small(eos_token="<eos>", pad_token=own)
        choice = ensure_padding(tokenizer, num_embeddings=6)
        assert choice.token == tokenizer.pad_token == "<|pad|>"
        assert choice.reason.startswith(IS_END if own else NONE)
        assert "added, where the model has embeddings to spare" in choice.reason
        assert tokenizer.pad_token_id == 5
        assert tokenizer.encode("hello world") == [1, 2]
        assert tokenizer.encode("hello<|pad|>") == [1, 5]

    @pytest.mark.parametrize("num_embeddings", [5, None])
    def test_a_model_never_grows_for_it(self, num_embeddings: int | None) -> None:
        """Only then the end pads, and that is said."""
        tokenizer = small(eos_token="<eos>")
        choice = ensure_padding(tokenizer, num_embeddings)
        assert choice.token == "<eos>"
        assert "no token is left; the end is trained all the same" in choice.reason
        assert len(tokenizer) == 5

    def test_a_word_of_the_vocabulary_never_pads(self) -> None:
        """It would vanish from every text that is decoded."""
        tokenizer = small("<reserved>", "padding", "unused", eos_token="<eos>")
        assert ensure_padding(tokenizer, num_embeddings=99).token == "<|pad|>"

    def test_nothing_to_pad_with_at_all(self) -> None:
        with pytest.raises(ModelError, match=r"no token to pad with.*tokenizer_name_or_path"):
            ensure_padding(small(), num_embeddings=5)

    def test_the_choice_is_saved(self, tmp_path: Path) -> None:
        tokenizer = small("<pad>", eos_token="<eos>", pad_token="<eos>")
        ensure_padding(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        assert ensure_padding(again) == PadChoice("<pad>", "the tokenizer's own")


class TestWhereGenerationStops:
    @pytest.mark.parametrize(
        ("of_model", "expected"),
        [(None, {0}), (0, {0}), (7, {0, 7}), ([7, 9], {0, 7, 9}), ([], {0})],
    )
    def test_at_the_model_s_ends_and_the_tokenizer_s(
        self, of_model: int | list[int] | None, expected: set[int]
    ) -> None:
        model: Any = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=of_model))
        assert stop_ids(model, small(eos_token="<eos>")) == expected

    def test_at_nothing_where_neither_names_one(self) -> None:
        model: Any = SimpleNamespace(generation_config=None)
        assert stop_ids(model, small()) == frozenset()


def with_extra_word(state: dict[str, Any]) -> None:
    state["model"]["vocab"]["zebra"] = len(state["model"]["vocab"])


def without_a_merge(state: dict[str, Any]) -> None:
    state["model"]["merges"].pop()


def with_another_merge_order(state: dict[str, Any]) -> None:
    state["model"]["merges"].reverse()


def with_digits_apart(state: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, state["pre_tokenizer"]],
    }


def with_a_space_in_front(state: dict[str, Any]) -> None:
    state["pre_tokenizer"]["add_prefix_space"] = True


def in_lower_case(state: dict[str, Any]) -> None:
    state["normalizer"] = {"type": "Lowercase"}


def with_an_added_token(state: dict[str, Any]) -> None:
    state["added_tokens"].append({**state["added_tokens"][1], "id": 999, "content": "<new>"})


def with_a_token_that_takes_spaces(state: dict[str, Any]) -> None:
    state["added_tokens"][1]["lstrip"] = True


class TestTheHash:
    """Of all that decides which ids a text becomes, and of nothing else."""

    @pytest.mark.parametrize(
        "change",
        [
            with_extra_word,
            without_a_merge,
            with_another_merge_order,
            with_digits_apart,
            with_a_space_in_front,
            in_lower_case,
            with_an_added_token,
            with_a_token_that_takes_spaces,
        ],
    )
    def test_it_changes_with_what_decides(
        self, folder: Path, change: Callable[[dict[str, Any]], None]
    ) -> None:
        before = tokenizer_hash(load_tokenizer(folder))
        path = folder / "tokenizer.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        change(state)
        path.write_text(json.dumps(state), encoding="utf-8")
        assert tokenizer_hash(load_tokenizer(folder)) != before

    def test_it_changes_in_memory_too(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        seen = {tokenizer_hash(tokenizer)}
        tokenizer.add_tokens(["<new>"])
        seen.add(tokenizer_hash(tokenizer))
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        seen.add(tokenizer_hash(tokenizer))
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
        seen.add(tokenizer_hash(tokenizer))
        assert len(seen) == 4

    def test_it_is_known_from_one_start_to_the_next(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
        tokenizer = load_tokenizer(folder)
        _hash_of.cache_clear()
        before = tokenizer_hash(tokenizer)
        (kept,) = (tmp_path / "cache" / "tokenizer_hashes").iterdir()
        _hash_of.cache_clear()
        with monkeypatch.context() as unhashed:
            unhashed.setattr("qlora_kit.model.tokenizer._hashed", pytest.fail)
            assert tokenizer_hash(tokenizer) == before
        kept.write_text(kept.read_text().replace(before, before[::-1]))
        _hash_of.cache_clear()
        assert tokenizer_hash(tokenizer) == before

    def test_how_rows_were_last_padded_or_cut_is_nothing_to_it(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        before = tokenizer_hash(tokenizer)
        tokenizer(["hello", "hello how are you"], padding=True, truncation=True, max_length=3)
        assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
        assert tokenizer_hash(tokenizer) == before

    @pytest.mark.parametrize("name", CHOICES)
    def test_saved_and_loaded_it_is_the_same(self, name: str, tmp_path: Path) -> None:
        tokenizer = CHOICES[name][0]()
        ensure_padding(tokenizer)
        before = tokenizer_hash(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        again = load_tokenizer(tmp_path)
        ensure_padding(again)
        assert tokenizer_hash(again) == before

    def test_with_an_added_pad_it_is_the_same_too(self, tmp_path: Path) -> None:
        tokenizer = small(eos_token="<eos>")
        before = tokenizer_hash(tokenizer)
        ensure_padding(tokenizer, num_embeddings=9)
        assert tokenizer_hash(tokenizer) == before
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_hash(load_tokenizer(tmp_path)) == before

    def test_a_template_has_its_own(self) -> None:
        hashes = [
            template_hash(small(template=template))
            for template in (None, "", TEMPLATE, TEMPLATE + "\n")
        ]
        assert hashes[:2] == [None, None]
        assert hashes[2] != hashes[3]
        assert hashes[2] == template_hash(small("more", template=TEMPLATE))


DATED = (
    "\n{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{{ date_string }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


class TestTemplateValues:
    def test_they_hold_wherever_the_template_is_used(self, tmp_path: Path) -> None:
        tokenizer = small(template=DATED)
        assert writes_the_date(tokenizer)
        before = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        set_template_values(tokenizer, {"date_string": "26 Jul 2024"})
        assert not writes_the_date(tokenizer)
        tokenizer.save_pretrained(tmp_path)
        for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            text = one.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
            assert text == "\n26 Jul 2024x"
        assert before != text

    def test_what_the_template_does_not_ask_for_is_refused(self) -> None:
        with pytest.raises(ModelError, match=r"no date_strng; did you mean date_string\?"):
            set_template_values(small(template=DATED), {"date_strng": "x"})
