"""Rendered data, kept under a name made of everything that decides what they are."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.environment import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.recipe import DataSpec

_UNUSED_SECONDS = 30 * 24 * 3600
_LEFTOVER_SECONDS = 24 * 3600
_STAMP = "used"
# What of the section does not change what is rendered.
_NOT_RENDERING = {"packing", "streaming"}


def cache_folder(
    part: str,
    spec: DataSpec,
    fingerprints: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: frozenset[int],
) -> Path:
    """Where one part of the data is kept once it is rendered.

    `fingerprints` stand for the bytes of its sources (and of those it must not repeat). The
    end of a turn is proved against `stop_ids` when it is rendered, so what was proved for others
    does not count.
    """
    facts = {
        "part": part,
        "section": spec.model_dump(mode="json", exclude=_NOT_RENDERING),
        "sources": list(fingerprints),
        "tokenizer": _tokenizer_facts(tokenizer),
        "stop_ids": sorted(stop_ids),
        "code": _code_digest(),
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    return cache_dir() / "data" / digest.hexdigest()


def stamp_used(folder: Path) -> None:
    """Say that an entry is of use still; remove those that none was for a month, and drafts that
    a killed run left a day ago.
    """
    (folder / _STAMP).touch()
    now = time.time()
    for other in folder.parent.iterdir():
        is_draft = other.name.endswith(".draft")
        limit = _LEFTOVER_SECONDS if is_draft else _UNUSED_SECONDS
        with suppress(FileNotFoundError):  # another process may be sweeping, too
            used = (other if is_draft else other / _STAMP).stat().st_mtime
            if now - used > limit:
                shutil.rmtree(other, ignore_errors=True)


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Ahead of the tokens stands what the last call has left behind, padding and truncation.
    _, tokens, state = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
    assert tokens, "a tokenizer is written in another way"
    return {
        "state": hashlib.blake2b(state.encode()).hexdigest(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": tokenizer.chat_template,
    }


@lru_cache(maxsize=1)
def _code_digest() -> str:
    """Of this package's own source, and of the libraries that render with it."""
    import jinja2
    import tokenizers
    import transformers

    digest = hashlib.blake2b()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.read_bytes())
    versions = [jinja2.__version__, tokenizers.__version__, transformers.__version__]
    digest.update(" ".join(versions).encode())
    return digest.hexdigest()
