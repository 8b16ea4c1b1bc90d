"""A GGUF file run by llama.cpp, alone or with a LoRA beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.sequences import IGNORE_INDEX, TokenSequence
from qlora_kit.environment import available_cpus
from qlora_kit.errors import ModelError
from qlora_kit.runtime.gguf_header import GgufHeader, read_header
from qlora_kit.runtime.llama_library import PASS_TOKENS, Decoder, LoadedModel, Piece
from qlora_kit.runtime.protocol import Footprint, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# llama.cpp rounds contexts up to this many tokens.
_CONTEXT_STEP = 256
ADAPTER_FILE = "adapter.gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class LlamaCppRuntime:
    """One loaded GGUF model; see `Runtime`. Logits are float32 on the CPU.

    Answers end where llama.cpp would end them: at the tokens that it takes from the file.
    """

    def __init__(
        self,
        name: str,
        model: LoadedModel,
        tokenizer: PreTrainedTokenizerBase,
        headers: Sequence[GgufHeader],
        adapter: Any = None,
    ):
        self.name = name
        self.tokenizer = tokenizer
        self._model = model
        self._headers = tuple(headers)
        self._adapter = adapter
        self._decoder: Decoder | None = None
        self._stop_ids = model.end_ids()

    @classmethod
    def open(
        cls,
        path: Path | str,
        tokenizer_folder: Path | None = None,
        lora: Path | str | None = None,
        name: str | None = None,
    ) -> LlamaCppRuntime:
        """Load a GGUF file, or the one in a folder.

        Args:
            tokenizer_folder: where the tokenizer's files are; unless given, those beside the
                GGUF file are taken, or the tokenizer is built from the file itself.
            lora: an adapter as GGUF, added to the base as it runs; unless given, the
                `adapter.gguf` in the folder, where a folder is named.

        Raises:
            ModelError: there is no such file, it is damaged, or llama.cpp cannot load it.
        """
        place = Path(path).expanduser()
        file = find_gguf(place)
        if lora is None and place.is_dir() and (place / ADAPTER_FILE).is_file():
            lora = place / ADAPTER_FILE
        headers = [read_header(file)]
        if headers[0].kind != "model":
            raise ModelError(
                f"{file} holds a GGUF {headers[0].kind}, not a model; name the base's file, and "
                "the adapter beside it."
            )
        if lora is not None:
            headers.append(read_header(Path(lora)))
            _require_adapter(Path(lora), headers[1], headers[0])
        tokenizer = _tokenizer(file, tokenizer_folder, headers[0])
        model = LoadedModel(file)
        try:
            adapter = model.load_adapter(Path(lora)) if lora is not None else None
        except ModelError:
            model.close()
            raise
        return cls(name or str(path), model, tokenizer, headers, adapter)

    @property
    def stop_ids(self) -> frozenset[int]:
        return self._stop_ids

    @property
    def vocab_size(self) -> int:
        return self._model.num_tokens

    @property
    def context_tokens(self) -> int | None:
        return self._model.context_tokens or None

    def score(self, windows: Sequence[TokenSequence], batch_size: int) -> Iterator[Scored]:
        """Short windows share a pass; more tokens at once are not faster on a CPU."""
        for batch in _passes(windows, batch_size):
            decoder = self._room(sum(len(windows[i].input_ids) for i in batch), len(batch))
            decoder.forget_all()
            positions = [_scored_positions(windows[i]) for i in batch]
            logits = decoder.run(
                [
                    Piece(place, windows[i].input_ids, 0, [p - 1 for p in row])
                    for place, (i, row) in enumerate(zip(batch, positions, strict=True))
                ]
            )
            at = 0
            for i, row in zip(batch, positions, strict=True):
                own = torch.from_numpy(logits[at : at + len(row)])
                at += len(row)
                _require_numbers(own, windows[i].origin, self.name)
                yield Scored(i, own, torch.tensor([windows[i].labels[p] for p in row]))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Several prompts at a time; where one has ended, the next takes its place.

        A prompt that leaves the model no room has no answer.
        """
        limit = self._model.context_tokens or max(map(len, prompts), default=0) + max_new_tokens
        rooms = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
        waiting = [i for i, room in enumerate(rooms) if room > 0 and prompts[i]]
        answers: list[list[int]] = [[] for _ in prompts]
        if not waiting:
            return answers
        waiting.sort(key=lambda i: len(prompts[i]))  # the longest is taken first, from the end
        slots = min(batch_size, len(waiting))
        longest = sorted((len(prompts[i]) + rooms[i] for i in waiting), reverse=True)
        decoder = self._room(sum(longest[:slots]), slots)
        decoder.forget_all()
        running: dict[int, int] = {}
        while waiting or running:
            pieces = [
                Piece(slot, [answers[i][-1]], len(prompts[i]) + len(answers[i]) - 1, [0])
                for slot, i in running.items()
            ]
            for slot in range(slots):
                if slot not in running and waiting:
                    i = waiting.pop()
                    running[slot] = i
                    pieces.append(Piece(slot, prompts[i], 0, [len(prompts[i]) - 1]))
            choices = decoder.run(pieces).argmax(axis=1)
            for piece, token in zip(pieces, choices.tolist(), strict=True):
                i = running[piece.sequence]
                answers[i].append(token)
                if token in self._stop_ids or len(answers[i]) == rooms[i]:
                    decoder.forget(piece.sequence)
                    del running[piece.sequence]
        return answers

    def footprint(self) -> Footprint:
        """Parameters by ggml type, from the headers; those of a LoRA count as well."""
        parameters: dict[str, int] = {}
        for header in self._headers:
            for kind, count in header.parameters.items():
                parameters[kind] = parameters.get(kind, 0) + count
        return Footprint(
            parameters,
            memory_bytes=sum(header.weight_bytes for header in self._headers),
            disk_bytes=sum(header.file_bytes for header in self._headers),
        )

    def close(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None
        self._model.close()

    def _room(self, tokens: int, sequences: int) -> Decoder:
        """The context, made anew where the one that is there is too small."""
        now = self._decoder
        if now is not None and now.tokens >= tokens and now.sequences >= sequences:
            return now
        if now is not None:
            tokens, sequences = max(tokens, now.tokens), max(sequences, now.sequences)
            now.close()
            self._decoder = None
        tokens = -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP
        threads = min(torch.get_num_threads(), available_cpus())
        self._decoder = Decoder(self._model, tokens, sequences, threads, self._adapter)
        return self._decoder


def find_gguf(path: Path) -> Path:
    """A GGUF file, or the one model in a folder.

    Raises:
        ModelError: there is none, or several.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    models = [one for one in files if not one.name.startswith("adapter")]
    first_parts = [one for one in models if "-of-" not in one.name or "-00001-of-" in one.name]
    if len(first_parts) == 1:
        return first_parts[0]
    names = ", ".join(one.name for one in first_parts)
    raise ModelError(
        f"{path} holds several GGUF models ({names}); name one of them."
        if first_parts
        else f"{path} holds no GGUF model."
    )


def _require_adapter(path: Path, adapter: GgufHeader, base: GgufHeader) -> None:
    if adapter.kind != "adapter":
        raise ModelError(f"{path} holds a GGUF {adapter.kind}, not an adapter.")
    if adapter.architecture != base.architecture:
        raise ModelError(
            f"the adapter {path} is for the architecture {adapter.architecture}, and its base is "
            f"{base.architecture}; name the base that it was trained on."
        )


def _tokenizer(file: Path, folder: Path | None, header: GgufHeader) -> PreTrainedTokenizerBase:
    from qlora_kit.model.tokenizer import load_tokenizer

    if folder is not None:
        return load_tokenizer(folder)
    if all((file.parent / name).is_file() for name in _TOKENIZER_FILES):
        return load_tokenizer(file.parent)
    from qlora_kit.model.gguf_tokenizer import build_tokenizer

    return build_tokenizer(file, header.metadata)[0]


def _passes(windows: Sequence[TokenSequence], batch_size: int) -> Iterator[list[int]]:
    """Windows of one pass, longest first, in an order that only what they hold decides."""
    order = sorted(
        range(len(windows)), key=lambda i: (-len(windows[i].input_ids), windows[i].input_ids)
    )
    batch: list[int] = []
    tokens = 0
    for i in order:
        length = len(windows[i].input_ids)
        if batch and (len(batch) == batch_size or tokens + length > PASS_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += length
    if batch:
        yield batch


def _scored_positions(window: TokenSequence) -> list[int]:
    """Where supervised tokens stand; each is predicted by the logits one place before."""
    return [p for p, label in enumerate(window.labels) if p > 0 and label != IGNORE_INDEX]


def _require_numbers(logits: torch.Tensor, origin: str, name: str) -> None:
    if not torch.isfinite(logits).all():
        raise ModelError(
            f"the output of {name} for {origin} is not a number (NaN): its weights are damaged, "
            "or were out of the range of their type; make the GGUF file anew, as BF16 or F32."
        )
