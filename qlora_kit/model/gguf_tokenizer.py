"""A GGUF file's tokenizer as a plain tokenizer.json.

transformers rebuilds a byte-level BPE tokenizer from a GGUF file with losses: it ignores
`tokenizer.ggml.pre` (so digits and runs of spaces are split differently from the original), takes
the begin token for the end token, and decodes with clean-up. So byte-level BPE is built here from
the metadata; other kinds keep transformers' result, with the special tokens put right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_kit.errors import ModelError

# Token types of the GGUF specification (`tokenizer.ggml.token_type`).
_CONTROL = 3
_USER_DEFINED = 4

# Tokens that models reserve for padding, or never produce inside a conversation; the best first.
_PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|vision_pad|>",
    "<|endoftext|>",
    "<unk>",
)

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How one `tokenizer.ggml.pre` splits text before BPE merges it."""

    split: str | None = None
    """Regular expression whose matches are kept apart; None is GPT-2's own."""
    individual_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    """Take a word that is in the vocabulary as it is, without merging up to it."""
    adds_bos: bool = False
    """Whether bos is prepended where the file does not say (`tokenizer.ggml.add_bos_token`)."""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(individual_digits=True)
_LLAMA3 = PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": PreTokenizer(split=_QWEN2_SPLIT, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(split=_QWEN2_SPLIT, nfc=True),
    "qwen35": PreTokenizer(split=_QWEN35_SPLIT, nfc=True),
    "tekken": PreTokenizer(split=_TEKKEN_SPLIT, ignore_merges=True, adds_bos=True),
}
"""`tokenizer.ggml.pre` as llama.cpp names it, for the tokenizers whose rules are known for sure."""


def build_tokenizer(
    gguf_path: Path, metadata: Mapping[str, Any]
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a GGUF file, and what about it could not be made sure of.

    Args:
        metadata: the file's key-value pairs.

    Raises:
        ModelError: the file carries no vocabulary, or one that contradicts itself.
    """
    if not metadata.get("tokenizer.ggml.tokens"):
        raise ModelError(
            f"{gguf_path.name} carries no tokenizer (no tokenizer.ggml.tokens); "
            "use a GGUF file of a whole language model."
        )
    warnings: list[str] = []
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "default")
        pre = PRE_TOKENIZERS.get(name, _GPT2)
        if name not in PRE_TOKENIZERS:
            warnings.append(
                f"the tokenizer's splitting rule {name!r} is not known here: GPT-2's is used, and "
                "numbers, spaces and non-English text may be split differently from the original"
            )
        backend, adds_bos = _byte_level_bpe(gguf_path, metadata, pre), pre.adds_bos
    else:
        warnings.append(
            f"the tokenizer (kind {kind!r}) is transformers' conversion, unchecked: compare the "
            "ids of a few texts with the original's"
        )
        backend, adds_bos = _converted_by_transformers(gguf_path, kind), kind == "llama"

    special = _special_tokens(metadata)
    for name in ("eos_token", "pad_token"):
        if name not in special:
            warnings.append(f"the file names no token that can be the {name}: none is set")
    if "tokenizer.chat_template" not in metadata:
        warnings.append("the file carries no chat template")
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    limit = metadata.get(f"{metadata['general.architecture']}.context_length")
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": None, "eos_token": None, **special},
        add_bos_token=adds_bos and "bos_token" in special,
        add_eos_token=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({"model_max_length": int(limit)} if limit else {}),
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer, warnings


def _byte_level_bpe(path: Path, metadata: Mapping[str, Any], pre: PreTokenizer) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    strange = next((m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()), None)
    if strange is not None:
        raise ModelError(
            f"{path.name} is damaged: its tokenizer merges {strange}, which is not in its "
            "vocabulary; fetch the file again."
        )
    backend = _without_vocabulary(pre)
    backend.model = BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    return backend


def _without_vocabulary(pre: PreTokenizer) -> Tokenizer:
    """A byte-level tokenizer that splits by this rule, and knows no tokens."""
    backend = Tokenizer(BPE(ignore_merges=pre.ignore_merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre.individual_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def splitting_of(pre: PreTokenizer) -> tuple[Any, Any, bool]:
    """Normalizer, pre-tokenizer and ignore_merges of this rule, as a tokenizer.json has them."""
    described = json.loads(_without_vocabulary(pre).to_str())
    return described["normalizer"], described["pre_tokenizer"], pre.ignore_merges


def _converted_by_transformers(path: Path, kind: str | None) -> Tokenizer:
    try:
        loaded: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"transformers cannot rebuild the tokenizer (kind {kind!r}) of {path.name}: {error!r}; "
            "use the original safetensors model."
        ) from error
    backend = loaded.backend_tokenizer
    assert isinstance(backend, Tokenizer)
    return backend


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos, eos, unk and pad by the ids that the file states; pad is never eos."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    special: dict[str, str] = {}
    for name, key in keys.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            special[name] = tokens[index]
    eos = special.get("eos_token")
    if special.get("pad_token", eos) == eos:
        special.pop("pad_token", None)
        present = set(tokens)
        fit = [token for token in _PAD_CANDIDATES if token in present and token != eos]
        if fit:
            special["pad_token"] = fit[0]
    return special
