"""A folder with `model.onnx`, run by ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from qlora_kit.errors import ModelError
from qlora_kit.runtime.batches import LOGITS_BYTES, batch_windows, scored_positions
from qlora_kit.runtime.footprint import disk_bytes
from qlora_kit.runtime.forward import require_numbers
from qlora_kit.runtime.onnx_session import OnnxSession, Step
from qlora_kit.runtime.onnx_weights import stored_weights
from qlora_kit.runtime.protocol import Footprint, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.sequences import TokenSequence

GRAPH_FILE = "model.onnx"
# What stands in the folder of a graph and is needed to load it, beside a tokenizer's files.
_GRAPH_FILES = ("*.onnx", "*.onnx.data", "*.onnx_data")


@dataclass
class OnnxRuntime:
    """See `runtime.protocol.Runtime`. Logits are float32, on the CPU."""

    name: str
    folder: Path
    session: OnnxSession
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    context_tokens: int | None

    @classmethod
    def open(cls, folder: Path | str) -> OnnxRuntime:
        """
        Raises:
            ModelError: the graph, its configuration or its tokenizer is missing or cannot be read.
            HardwareError: onnxruntime is not installed.
        """
        from transformers import GenerationConfig

        from qlora_kit.model.skeleton import load_config
        from qlora_kit.model.tokenizer import ensure_padding, load_tokenizer, stop_ids_of

        path = Path(folder).expanduser()
        if not (path / GRAPH_FILE).is_file():
            raise ModelError(f"{folder} has no {GRAPH_FILE}; name the folder of an ONNX export.")
        config = load_config(path).get_text_config()
        tokenizer = load_tokenizer(path)
        session = OnnxSession(path / GRAPH_FILE)
        ensure_padding(tokenizer, session.vocab_size)
        generation = None
        if (path / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(path)
        limit = getattr(config, "max_position_embeddings", None)
        return cls(
            name=str(folder),
            folder=path,
            session=session,
            tokenizer=tokenizer,
            stop_ids=stop_ids_of(generation, tokenizer),
            context_tokens=int(limit) if limit else None,
        )

    @property
    def vocab_size(self) -> int:
        return self.session.vocab_size

    def score(self, windows: Sequence[TokenSequence], batch_size: int) -> Iterator[Scored]:
        """Longest windows first, padded on the right, where earlier tokens do not see it."""
        for batch in batch_windows(windows, batch_size, self.vocab_size, logits_everywhere=True):
            ids, mask = self._padded([windows[i].input_ids for i in batch], on_the_left=False)
            positions = [scored_positions(windows[i]) for i in batch]
            found: list[list[torch.Tensor]] = [[] for _ in batch]
            for start, step in self._pieces(ids, mask):
                end = start + step.logits.shape[1]
                for row, places in enumerate(positions):
                    here = [p - 1 - start for p in places if start <= p - 1 < end]
                    found[row].append(torch.from_numpy(step.logits[row, here]))
            for row, index in enumerate(batch):
                logits = torch.cat(found[row])
                require_numbers(logits, windows[index].origin)
                targets = torch.tensor([windows[index].labels[p] for p in positions[row]])
                yield Scored(index, logits, targets)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Prompts of like length are answered together, padded on the left."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
        answers: dict[int, list[int]] = {}
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            rows = self._answer([prompts[i] for i in batch], max_new_tokens)
            answers.update(zip(batch, rows, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def footprint(self) -> Footprint:
        weights = stored_weights(self.folder / GRAPH_FILE)
        files = {path for pattern in _GRAPH_FILES for path in self.folder.glob(pattern)}
        on_disk = disk_bytes([self.folder]) + sum(path.stat().st_size for path in files)
        return Footprint(weights.parameters, weights.memory_bytes, on_disk)

    def close(self) -> None:
        del self.session

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Every row goes on until the last has ended; what follows a row's end is dropped."""
        answers: list[list[int]] = [[] for _ in prompts]
        ids, mask = self._padded(prompts, on_the_left=True)
        *_, (_, step) = self._pieces(ids, mask)
        for number in range(1, max_new_tokens + 1):
            chosen = step.logits[:, -1].argmax(axis=-1)
            running = False
            for answer, token in zip(answers, chosen.tolist(), strict=True):
                if not answer or answer[-1] not in self.stop_ids:
                    answer.append(token)
                    running = running or token not in self.stop_ids
            if not running or number == max_new_tokens:
                break
            if self.session.has_cache:
                step = self.session.run(chosen[:, None], step.past)
            else:
                ids = np.concatenate([ids, chosen[:, None]], axis=1)
                mask = np.concatenate([mask, np.ones_like(chosen[:, None])], axis=1)
                *_, (_, step) = self._pieces(ids, mask)
        return answers

    def _pieces(self, ids: np.ndarray, mask: np.ndarray) -> Iterator[tuple[int, Step]]:
        """So many tokens at a time that their logits fit, each piece with where it starts; all at
        once where the graph has no cache.
        """
        length = ids.shape[1]
        size = max(1, LOGITS_BYTES // (4 * self.vocab_size * len(ids)))
        past = None
        for start in range(0, length, size if self.session.has_cache else length):
            here = slice(start, start + size) if self.session.has_cache else slice(None)
            step = self.session.run(ids[:, here], past, mask[:, here])
            past = step.past
            yield start, step

    def _padded(
        self, rows: Sequence[Sequence[int]], on_the_left: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, mask), each (rows, longest)."""
        shape = (len(rows), max(map(len, rows)))
        ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for number, row in enumerate(rows):
            place = slice(-len(row), None) if on_the_left else slice(0, len(row))
            ids[number, place] = row
            mask[number, place] = 1
        return ids, mask
