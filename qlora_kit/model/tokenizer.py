"""The tokenizer of a base model, ready to train with."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateSyntaxError

from qlora_kit import kept
from qlora_kit.errors import ModelError
from qlora_kit.model.reason import reason_of
from qlora_kit.templates import library

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Tokens that models reserve and never write; any of them can pad. The best known come first.
_SPARE_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
)
_SPARE_PATTERN = re.compile(
    r"[<\[].{0,2}(pad|.*_pad|reserved.*|unused.*|extra_id.*).{0,2}[>\]]", re.I
)
_NEW_PAD = "<|pad|>"
_KIND = "tokenizer_hashes"  # in the cache
_METHOD = 1  # another one whenever `_hashed` says something else of the same
_BAD_TOKENIZER = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True)
class PadChoice:
    """Which token pads, and why."""

    token: str
    reason: str


def load_tokenizer(
    folder: Path, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with `chat_template` (a file, or one of the kit's) in place of its own.

    Raises:
        ModelError: there is none, it cannot be read, or it has no fast version.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        # The tokenizers library raises Exception itself for a file that it cannot parse.
        if not isinstance(error, _BAD_TOKENIZER) and type(error) is not Exception:
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer in {folder} brings its own Python code, which does not run "
                "unasked. Set model.trust_remote_code: true if you trust where it comes from."
            ) from error
        raise ModelError(
            f"{folder} has no tokenizer that can be read ({reason_of(error)}). "
            "Name one with model.tokenizer_name_or_path."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer in {folder} has no fast version (tokenizer.json), which is needed to "
            "tell which tokens are supervised."
        )
    if len(tokenizer) == 0:
        raise ModelError(f"the tokenizer in {folder} knows no tokens; fetch it again.")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(template_file(chat_template))
    return tokenizer


def ensure_padding(
    tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None = None
) -> PadChoice:
    """Give the tokenizer a pad token that is not its end token and that no text contains.

    A pad token equal to the end token makes many tools train without ever seeing the end, and one
    from the ordinary vocabulary would vanish from every text that is decoded. Where the vocabulary
    reserves none, one is added if the model has `num_embeddings` to spare; the model never grows.
    """
    own = _text(tokenizer.pad_token)
    if own is not None and _can_pad(tokenizer, own):
        return PadChoice(own, "the tokenizer's own")
    if own is None:
        why = "the tokenizer names none"
    else:
        is_end = own == _text(tokenizer.eos_token)
        why = f"the tokenizer's own {'is the end token' if is_end else 'stands in its template'}"
    for token in _spare_tokens(tokenizer):
        if _can_pad(tokenizer, token):
            tokenizer.pad_token = token
            return PadChoice(token, why)
    if num_embeddings is not None and len(tokenizer) < num_embeddings:
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
        return PadChoice(_NEW_PAD, f"{why}; added, where the model has embeddings to spare")
    last = _text(tokenizer.eos_token) or own
    if last is None:
        raise ModelError(
            "the tokenizer has no token to pad with, and not even an end token; name another with "
            "model.tokenizer_name_or_path."
        )
    tokenizer.pad_token = last
    return PadChoice(last, f"{why}, and no token is left; the end is trained all the same")


def _spare_tokens(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    vocabulary = tokenizer.get_vocab()
    yield from (token for token in _SPARE_TOKENS if token in vocabulary)
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
    yield from (token for token, _ in added if _SPARE_PATTERN.fullmatch(token))
    for token in map(_text, (tokenizer.unk_token, tokenizer.bos_token)):
        if token is not None and token in vocabulary:
            yield token


def _can_pad(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Neither the end token nor one that the chat template writes."""
    if token == _text(tokenizer.eos_token):
        return False
    template = str(tokenizer.chat_template or "")
    named = [
        f"{role}_token"
        for role in ("bos", "unk")
        if token == _text(getattr(tokenizer, f"{role}_token"))
    ]
    return token not in template and not any(name in template for name in named)


def _text(token: object) -> str | None:
    return None if token is None else str(token)


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids at which generation with this model stops."""
    return stop_ids_of(model.generation_config, tokenizer)


def stop_ids_of(
    config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The same by the generation settings of a model that is not loaded."""
    ids: set[int] = set()
    for value in (config.eos_token_id if config else None, tokenizer.eos_token_id):
        if value is not None:
            ids |= set(value) if isinstance(value, list) else {value}
    return frozenset(ids)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which ids a text becomes.

    Not of how rows are padded or truncated, which the last call has left behind, nor of the pad
    token, which a tokenizer that was saved knows and the one it was made from may not.
    """
    return _hash_of(tokenizer.backend_tokenizer.to_str(), _text(tokenizer.pad_token))


@lru_cache(maxsize=2)
def _hash_of(backend: str, pad: str | None) -> str:
    """Remembered, here and from one start to the next: the text is megabytes long, and every start
    and every adapter that is written asks for it.
    """
    digest = hashlib.sha256(backend.encode()).hexdigest()
    key = kept.key_of({"method": _METHOD, "backend": digest, "pad": pad})
    known = kept.recall(_KIND, key)
    if known is not None:
        return str(known["sha256"])
    found = _hashed(backend, pad)
    kept.keep(_KIND, key, {"sha256": found})
    return found


def _hashed(backend: str, pad: str | None) -> str:
    state = json.loads(backend)
    state["padding"] = state["truncation"] = None
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] != pad]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, None where there is none."""
    template = tokenizer.chat_template
    if not template:
        return None
    return hashlib.sha256(str(template).encode()).hexdigest()


def set_template_values(
    tokenizer: PreTrainedTokenizerBase, values: Mapping[str, str | bool | int]
) -> None:
    """Write values into the chat template itself, so that they hold wherever it is used.

    Raises:
        ModelError: there is no template, or it asks for no such value.
    """
    if not values:
        return
    template = str(tokenizer.chat_template or "")
    asked = _asked_for(template)
    for name in values:
        if name not in asked:
            near = difflib.get_close_matches(name, asked, n=1)
            meant = f"; did you mean {near[0]}?" if near else f"; it asks for {', '.join(asked)}."
            raise ModelError(f"model.chat_template_kwargs: the template asks for no {name}{meant}")
    lines = [f"{{% set {name} = {json.dumps(value)} %}}" for name, value in values.items()]
    # The empty text keeps a line break that the template may begin with.
    tokenizer.chat_template = "".join(lines) + "{{ '' }}" + template


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template may write the day on which it is used."""
    template = str(tokenizer.chat_template or "")
    return "strftime_now" in template and '{% set date_string = "' not in template


def _asked_for(template: str) -> list[str]:
    from jinja2 import meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template(template).environment.parse(template)
    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception"}
    return sorted(meta.find_undeclared_variables(tree) - given)


def template_file(name: str) -> Path:
    """The Jinja file of that name: one of the user's before one that comes with the kit."""
    path = Path(name).expanduser()
    return path if path.is_file() else library().get(name, path)


def _read_template(path: Path) -> str:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"model.chat_template: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ModelError(f"model.chat_template: {path} is not UTF-8 text.") from None
    if not text.strip():
        raise ModelError(f"model.chat_template: {path} is empty.")
    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"model.chat_template: {path}:{error.lineno} is not Jinja: {error.message}."
        ) from None
    return text
