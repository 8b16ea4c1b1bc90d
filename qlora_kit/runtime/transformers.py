"""A model that transformers runs: a base with or without its adapter, or a folder as it stands."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from qlora_kit.model.without_bars import without_bars
from qlora_kit.out_of_memory import in_batches_that_fit
from qlora_kit.runtime.footprint import disk_bytes, memory_bytes, parameters_by_form
from qlora_kit.runtime.forward import (
    CausalModel,
    CausalScorer,
    context_tokens,
    evaluation_mode,
    inference_context,
    told_what_fails,
    vocab_size,
)
from qlora_kit.runtime.greedy import generate_batch, greedy_config
from qlora_kit.runtime.protocol import Footprint, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.model.base import Base
    from qlora_kit.subject import Subject


@dataclass
class TransformersRuntime:
    """See `runtime.protocol.Runtime`. `folders` are those that the model was loaded from."""

    name: str
    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    compute_dtype: torch.dtype | None = None
    folders: tuple[Path, ...] = ()

    @classmethod
    def on_base(
        cls, name: str, model: CausalModel, base: Base, *folders: Path
    ) -> TransformersRuntime:
        """The base's own model, the one with an adapter on it, or a merged one: tokenizer, compute
        dtype and the tokens that end an answer are the base's. `folders` come beside the base's.
        """
        return cls(
            name=name,
            model=model,
            tokenizer=base.tokenizer,
            stop_ids=base.stop_ids,
            compute_dtype=base.compute_dtype,
            folders=(base.source.folder, *folders),
        )

    @classmethod
    def of(cls, subject: Subject) -> TransformersRuntime:
        folders = () if subject.adapter is None else (subject.adapter,)
        return cls.on_base(subject.name, subject.model, subject.base, *folders)

    @property
    def vocab_size(self) -> int:
        return vocab_size(self.model)

    @property
    def context_tokens(self) -> int | None:
        return context_tokens(self.model)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @contextmanager
    def without_adapter(self, name: str) -> Iterator[TransformersRuntime]:
        """The same model with its adapter off, while the context lasts."""
        assert isinstance(self.model, PeftModel)
        with self.model.disable_adapter():
            yield replace(self, name=name)

    def score(self, windows: Sequence[TokenSequence], batch_size: int) -> Iterator[Scored]:
        """Longest windows first, padded on the right."""
        pad_token_id = self.tokenizer.pad_token_id
        return CausalScorer(self.model, pad_token_id, self.compute_dtype).score(windows, batch_size)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Prompts of like length are answered together, padded on the left."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i])))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        config = greedy_config(max_new_tokens, self.stop_ids, self.tokenizer.pad_token_id)

        def answer(batch: Sequence[int]) -> list[list[int]]:
            with (
                told_what_fails(self.model),
                without_bars(),
                evaluation_mode(self.model),
                inference_context(self.model.device, self.compute_dtype),
            ):
                return generate_batch(self.model, [prompts[i] for i in batch], config)

        answers: dict[int, list[int]] = {}
        for batch, rows in in_batches_that_fit(batches, answer, self.model.device.type):
            for i, ids in zip(batch, rows, strict=True):
                answers[i] = self._up_to_the_end(ids)
        return [answers[i] for i in range(len(prompts))]

    def _up_to_the_end(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        return ids if end is None else ids[: end + 1]

    def footprint(self) -> Footprint:
        return Footprint(
            parameters=parameters_by_form(self.model),
            memory_bytes=memory_bytes(self.model),
            disk_bytes=disk_bytes(self.folders),
        )

    def close(self) -> None:
        is_on_gpu = self.model.device.type == "cuda"
        del self.model
        gc.collect()
        if is_on_gpu:
            torch.cuda.empty_cache()
