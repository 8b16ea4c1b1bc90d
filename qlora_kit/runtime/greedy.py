"""Greedy decoding with transformers: padded on the left, and nothing else decides the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from qlora_kit.runtime.forward import CausalModel, base_model_of

if TYPE_CHECKING:
    from transformers import GenerationConfig


def greedy_config(
    max_new_tokens: int, stop_ids: frozenset[int], pad_token_id: int
) -> GenerationConfig:
    """Plain greedy decoding.

    `generate` fills every field that is left at None from the model's own config, so whatever
    would change the answer is set to what has no effect.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad_token_id,
        eos_token_id=sorted(stop_ids) or None,
    )


@contextmanager
def own_settings_aside(model: CausalModel) -> Iterator[None]:
    """Put the model's generation config aside while the context lasts.

    Some of its fields (forced or suppressed tokens, max_length) have no value without effect,
    and would come back through `generate`.
    """
    from transformers import GenerationConfig

    inner = base_model_of(model)
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def generate_batch(
    model: CausalModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> list[list[int]]:
    """New token ids of each prompt, with what follows the end still there."""
    longest = max(len(prompt) for prompt in prompts)
    gaps = [longest - len(prompt) for prompt in prompts]
    input_ids = torch.tensor(
        [
            [*[config.pad_token_id] * gap, *prompt]
            for gap, prompt in zip(gaps, prompts, strict=True)
        ],
        device=model.device,
    )
    attention_mask = torch.tensor(
        [[0] * gap + [1] * (longest - gap) for gap in gaps], device=model.device
    )
    with own_settings_aside(model):
        output: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config
        )
    rows: list[list[int]] = output[:, longest:].tolist()
    return rows
