"""llama.cpp by its C functions: a model, and batches of tokens through it.

The bindings' own class runs one sequence at a time; the functions underneath run many at once,
and compute logits only where they are wanted. llama.cpp aborts the whole process where its rules
are broken, so what it would not take never reaches it.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qlora_kit.errors import ModelError

# Tokens that go through the model in one pass. More take more memory and are not faster.
PASS_TOKENS = 512

_said: deque[str] = deque(maxlen=30)
# ggml.h: 2 info, 3 warning, 4 error, 5 what goes on with the line before.
_FAULT_LEVELS = (3, 4)


@lru_cache(maxsize=1)
def library() -> ModuleType:
    """The bindings, with what llama.cpp says kept from the terminal.

    Raises:
        ModelError: they are not installed, or cannot be loaded.
    """
    try:
        bindings = import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"running GGUF files needs llama-cpp-python, which cannot be imported ({error}): "
            "pip install 'qlora-kit[gguf]'."
        ) from None
    bindings.llama_log_set(_log_callback(bindings), ctypes.c_void_p(0))
    bindings.llama_backend_init()
    return bindings


@lru_cache(maxsize=1)
def _log_callback(bindings: ModuleType) -> Any:
    """Kept for as long as the process runs: llama.cpp calls it whenever it has something to say."""

    def keep(level: int, text: bytes, _: object) -> None:
        if level in _FAULT_LEVELS:
            _said.append(text.decode("utf-8", errors="replace").strip())

    return bindings.llama_log_callback(keep)


def what_was_said() -> str:
    """llama.cpp's last complaints, for a message; they are forgotten."""
    lines = [line for line in _said if line]
    _said.clear()
    return " / ".join(lines[-3:]) or "it does not say why"


class LoadedModel:
    """A GGUF file in memory, or only its vocabulary."""

    def __init__(self, path: Path, vocab_only: bool = False):
        """Raises ModelError where llama.cpp cannot load it."""
        self._api = library()
        _said.clear()
        settings = self._api.llama_model_default_params()
        settings.vocab_only = vocab_only
        self.handle = self._api.llama_model_load_from_file(str(path).encode(), settings)
        if not self.handle:
            raise ModelError(f"llama.cpp cannot load {path}: {what_was_said()}.")
        self._vocabulary = self._api.llama_model_get_vocab(self.handle)
        self.num_tokens = int(self._api.llama_vocab_n_tokens(self._vocabulary))

    @property
    def context_tokens(self) -> int:
        """What it was trained to attend to."""
        return int(self._api.llama_model_n_ctx_train(self.handle))

    @property
    def adds_bos(self) -> bool:
        """Whether a program that follows the file puts the begin token before a prompt."""
        return bool(self._api.llama_vocab_get_add_bos(self._vocabulary))

    @property
    def bos_id(self) -> int:
        return int(self._api.llama_vocab_bos(self._vocabulary))

    def end_ids(self) -> frozenset[int]:
        """Tokens at which llama.cpp ends an answer."""
        is_end = self._api.llama_vocab_is_eog
        return frozenset(i for i in range(self.num_tokens) if is_end(self._vocabulary, i))

    def text_setting(self, key: str) -> str | None:
        """What the file's metadata says under `key`, where that is a text."""
        read = self._api.llama_model_meta_val_str
        length = read(self.handle, key.encode(), None, 0)
        if length < 0:
            return None
        buffer = ctypes.create_string_buffer(length + 1)
        read(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace")

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of text in which special tokens are spelled, as in a rendered template."""
        data = text.encode("utf-8", errors="surrogatepass")
        room = len(data) + 8
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(
            self._vocabulary, data, len(data), ids, room, add_special, True
        )
        if count < 0:
            raise ModelError(f"llama.cpp cannot tokenize {text[:40]!r}.")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """What one token stands for."""
        buffer = ctypes.create_string_buffer(512)
        length = self._api.llama_token_to_piece(
            self._vocabulary, token, buffer, len(buffer), 0, True
        )
        return buffer.raw[: max(length, 0)]

    def load_adapter(self, path: Path) -> Any:
        """A LoRA in a GGUF file, freed with the model. ModelError where it does not fit."""
        _said.clear()
        adapter = self._api.llama_adapter_lora_init(self.handle, str(path).encode())
        if not adapter:
            raise ModelError(f"llama.cpp cannot load the adapter {path}: {what_was_said()}.")
        return adapter

    def close(self) -> None:
        if self.handle:
            self._api.llama_model_free(self.handle)
        self.handle = None


@dataclass(frozen=True)
class Piece:
    """Tokens that follow what a sequence holds already.

    `start` is the position of the first; `wanted` are places in `ids` whose logits are wanted.
    """

    sequence: int
    ids: Sequence[int]
    start: int
    wanted: Sequence[int]


class Decoder:
    """A context of llama.cpp: several sequences, their keys and values, and passes over them."""

    def __init__(
        self, model: LoadedModel, tokens: int, sequences: int, threads: int, adapter: Any = None
    ):
        """Room for `tokens` in all sequences together. ModelError where it cannot be had."""
        self._api = library()
        self.tokens = tokens
        self.sequences = sequences
        self._vocab_size = model.num_tokens
        settings = self._api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_ubatch = min(PASS_TOKENS, tokens)
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        settings.no_perf = True
        _said.clear()
        self._handle = self._api.llama_init_from_model(model.handle, settings)
        if not self._handle:
            raise ModelError(
                f"llama.cpp has no context of {tokens:,} tokens for this model: {what_was_said()}."
            )
        self._memory = self._api.llama_get_memory(self._handle)
        self._batch = self._api.llama_batch_init(tokens, 0, 1)
        if adapter is not None:
            adapters = (self._api.llama_adapter_lora_p_ctypes * 1)(adapter)
            scales = (ctypes.c_float * 1)(1.0)
            failed = self._api.llama_set_adapters_lora(self._handle, adapters, 1, scales)
            assert not failed, "one adapter with scale 1 is always taken"

    def run(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Logits where they are wanted, in the order of the pieces: float32 (wanted, vocabulary).

        Raises:
            ModelError: llama.cpp could not compute them.
        """
        count = sum(len(piece.ids) for piece in pieces)
        wanted = sum(len(piece.wanted) for piece in pieces)
        assert 0 < count <= self.tokens, "the batch is larger than the context"
        assert wanted > 0, "nothing is asked"
        self._fill(pieces)
        self._batch.n_tokens = count
        code = self._api.llama_decode(self._handle, self._batch)
        if code:
            raise ModelError(f"llama.cpp failed on a batch (code {code}): {what_was_said()}.")
        logits = self._api.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, shape=(wanted, self._vocab_size)).copy()

    def _fill(self, pieces: Sequence[Piece]) -> None:
        at = 0
        batch = self._batch
        for piece in pieces:
            assert 0 <= piece.sequence < self.sequences
            wanted = set(piece.wanted)
            for place, token in enumerate(piece.ids):
                assert 0 <= token < self._vocab_size, "a token that the model does not have"
                batch.token[at] = token
                batch.pos[at] = piece.start + place
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = piece.sequence
                batch.logits[at] = place in wanted
                at += 1

    def forget(self, sequence: int) -> None:
        """Free what one sequence holds."""
        self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def forget_all(self) -> None:
        self._api.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        if self._handle:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._handle)
        self._handle = None
