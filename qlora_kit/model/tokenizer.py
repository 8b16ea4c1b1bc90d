"""The tokenizer of a base model, ready to train with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateSyntaxError

from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens that models reserve and never write; any of them can pad.
_SPARE_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<unk>",
    "[UNK]",
)


@dataclass(frozen=True)
class PadChoice:
    """Which token pads, and why."""

    token: str
    reason: str


def load_tokenizer(
    folder: Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with `chat_template` (a Jinja file) in place of its own.

    Raises:
        ModelError: there is none, it cannot be read, or it has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (
            str(error).strip().splitlines()[0]
            if str(error).strip()
            else type(error).__name__
        )
        raise ModelError(
            f"{folder} has no tokenizer that can be read ({reason}). "
            "Name one with model.tokenizer_name_or_path."
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {folder} has no fast version (tokenizer.json), which is needed to "
            "tell which tokens are supervised."
        )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(Path(chat_template).expanduser())
    return tokenizer


def ensure_padding(tokenizer: PreTrainedTokenizerBase) -> PadChoice:
    """Give the tokenizer a pad token that is not its end token, without growing the vocabulary.

    A pad token equal to the end token makes many tools train without ever seeing the end.

    Raises:
        ModelError: the vocabulary has no token to spare.
    """
    stops = {tokenizer.eos_token}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in stops:
        return PadChoice(tokenizer.pad_token, "the tokenizer's own")
    vocabulary = tokenizer.get_vocab()
    for token in (*_SPARE_TOKENS, tokenizer.unk_token, tokenizer.bos_token):
        if token is not None and token in vocabulary and token not in stops:
            why = "is missing" if tokenizer.pad_token is None else "is the end token"
            tokenizer.pad_token = token
            return PadChoice(token, f"the tokenizer's own {why}")
    # Labels and attention are masked wherever padding stands, so any id is safe to pad with
    # as long as it is not taken for an end; the first one of the vocabulary is.
    token = tokenizer.convert_ids_to_tokens(0)
    if token is None or token in stops:
        raise ModelError(
            "the tokenizer has no token to pad with; add one to it, or name another tokenizer "
            "with model.tokenizer_name_or_path."
        )
    tokenizer.pad_token = token
    return PadChoice(token, "no reserved token is left")


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Token ids at which generation with this model stops."""
    ids: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        ids |= (
            set(value)
            if isinstance(value, list)
            else {value}
            if value is not None
            else set()
        )
    return frozenset(ids)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which ids a text becomes."""
    backend = tokenizer.backend_tokenizer
    state = backend.to_str()
    return hashlib.sha256(state.encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, None where there is none."""
    template = tokenizer.chat_template
    if not template:
        return None
    return hashlib.sha256(str(template).encode()).hexdigest()


def _read_template(path: Path) -> str:
    from jinja2 import Environment

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"model.chat_template: {path} cannot be read: {error.strerror}."
        ) from None
    except UnicodeDecodeError:
        raise ModelError(f"model.chat_template: {path} is not UTF-8 text.") from None
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"model.chat_template: {path}:{error.lineno} is not Jinja: {error.message}."
        ) from None
    return text
