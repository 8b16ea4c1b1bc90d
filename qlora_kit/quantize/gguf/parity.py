"""Do training, transformers on the exported folder and llama.cpp read a conversation alike?

A template or a splitting rule that differs by one character makes a model that was trained well
answer badly, and nothing says so. So the same conversations go through all three, and the token
ids have to be the same.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.data.encode import encode
from qlora_kit.data.rows import RowRefused
from qlora_kit.data.template import apply_template, turn_end
from qlora_kit.errors import ModelError
from qlora_kit.quantize.gguf.probes import conversations, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.examples import Conversation
    from qlora_kit.runtime.llama_library import LoadedModel

_TEMPLATE_KEY = "tokenizer.chat_template"
_SHOWN_TOKENS = 6
_SHOWN_TEXT = 60


@dataclass(frozen=True)
class Parity:
    """What was compared, all of it equal."""

    num_conversations: int
    num_texts: int
    num_tokens: int
    refused: tuple[str, ...] = ()
    """Conversations that the template itself refuses, everywhere alike."""
    composed: bool = False
    """llama.cpp was given texts with their characters composed (see `composes`)."""


def composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer composes characters before it reads them, by Unicode's form C, as Qwen's
    do; llama.cpp does it for none, and so reads a decomposed é otherwise.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return (described.get("normalizer") or {}).get("type") == "NFC"


def require_parity(
    trained: PreTrainedTokenizerBase,
    folder: Path,
    gguf_file: Path | None = None,
    also: Sequence[Conversation] = (),
) -> Parity:
    """Compare all that read conversations.

    Args:
        trained: the tokenizer that the model was trained with, template included.
        folder: the exported folder.
        gguf_file: made from it, whole or only the vocabulary.
        also: conversations of the user's own, beside the kit's.

    Raises:
        ModelError: something differs; shows the first difference.
    """
    from qlora_kit.model.tokenizer import load_tokenizer

    exported = load_tokenizer(folder)
    readers: dict[str, Callable[[str], list[int]]] = {
        f"transformers on {folder}": lambda text: encode(exported, text)
    }
    if gguf_file is None:
        return _compare(trained, exported, readers, also)
    from qlora_kit.runtime.llama_library import LoadedModel

    loaded = LoadedModel(gguf_file, vocab_only=True)
    try:
        _require_template(trained, loaded, gguf_file)
        _require_end(trained, loaded, gguf_file)
        composed = composes(trained)
        readers[f"llama.cpp on {gguf_file.name}"] = (
            (lambda text: loaded.tokenize(unicodedata.normalize("NFC", text)))
            if composed
            else loaded.tokenize
        )
        parity = _compare(trained, exported, readers, also)
        _require_added(trained, loaded, gguf_file)
    finally:
        loaded.close()
    return replace(parity, composed=composed)


def _compare(
    trained: PreTrainedTokenizerBase,
    exported: PreTrainedTokenizerBase,
    readers: dict[str, Callable[[str], list[int]]],
    also: Sequence[Conversation],
) -> Parity:
    refused: list[str] = []
    num_tokens = 0
    rendered: list[tuple[str, str]] = [(f"the text {text[:30]!r}", text) for text in texts(trained)]
    num_texts = len(rendered)
    asked = (*conversations(trained), *also) if trained.chat_template else ()
    for conversation in asked:
        text = _rendered(conversation, trained)
        other = _rendered(conversation, exported)
        if text != other:
            raise ModelError(_text_difference(conversation.origin, text, other))
        if text is None:
            refused.append(conversation.origin)
        else:
            rendered.append((conversation.origin, text))
    for name, text in rendered:
        expected = encode(trained, text)
        num_tokens += len(expected)
        for reader, read in readers.items():
            got = read(text)
            if got != expected:
                raise ModelError(_id_difference(name, reader, expected, got, trained))
    return Parity(len(rendered) - num_texts, num_texts, num_tokens, tuple(refused))


def _rendered(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """As text, asking for an answer where the user spoke last; None where it is refused."""
    asks = conversation.messages[-1].role != "assistant"
    try:
        return apply_template(conversation, tokenizer, prompt=asks)
    except RowRefused:
        return None


def _require_template(
    trained: PreTrainedTokenizerBase, loaded: LoadedModel, gguf_file: Path
) -> None:
    stored = loaded.text_setting(_TEMPLATE_KEY)
    if (stored or None) == (trained.chat_template or None):
        return
    if stored is None:
        raise ModelError(f"{gguf_file.name} has no chat template, and training had one.")
    raise ModelError(
        f"the chat template in {gguf_file.name} is not the one of training: "
        + _text_difference("the template", str(trained.chat_template or ""), stored)
    )


def _require_end(trained: PreTrainedTokenizerBase, loaded: LoadedModel, gguf_file: Path) -> None:
    """Whether llama.cpp ends an answer where training did."""
    if not trained.chat_template:
        return
    end = turn_end(trained)
    if end.id not in loaded.end_ids():
        raise ModelError(
            f"training ends an answer with {end.text!r}, which llama.cpp does not take for an end: "
            f"a model in {gguf_file.name} would go on talking. Let the tokenizer name it as its "
            "eos_token."
        )


def _require_added(trained: PreTrainedTokenizerBase, loaded: LoadedModel, gguf_file: Path) -> None:
    """What each of them puts before and after a text that is given without a template."""
    text = "How are you?"
    expected: list[int] = trained(text).input_ids
    got = loaded.tokenize(text, add_special=True)
    if got != expected:
        reader = f"llama.cpp on {gguf_file.name}"
        name = "a text with the tokens that a tokenizer adds by itself"
        raise ModelError(_id_difference(name, reader, expected, got, trained))


def _text_difference(name: str, expected: str | None, got: str | None) -> str:
    if expected is None or got is None:
        refuses = "training" if expected is None else "the export"
        return f"{name}: the template of {refuses} refuses this conversation, the other does not."
    at = _first_difference(expected, got)
    start = max(0, at - _SHOWN_TEXT // 2)
    return (
        f"{name}: the text differs at character {at}: "
        f"training …{expected[start : at + _SHOWN_TEXT]!r}, "
        f"the export …{got[start : at + _SHOWN_TEXT]!r}"
    )


def _id_difference(
    name: str,
    reader: str,
    expected: Sequence[int],
    got: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    at = _first_difference(expected, got)

    def shown(ids: Sequence[int]) -> str:
        tokens = [f"{i} {tokenizer.decode([i])!r}" for i in ids[at : at + _SHOWN_TOKENS]]
        return ", ".join(tokens) or "the end"

    before = tokenizer.decode(list(expected[max(0, at - 10) : at]))
    return (
        f"{reader} reads {name} otherwise than training did, from token {at} on, after "
        f"…{before!r}: training has {shown(expected)}; it has {shown(got)}. An export that reads "
        "otherwise answers otherwise, so there is none."
    )


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    pairs = zip(first, second, strict=False)
    length = min(len(first), len(second))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), length)
