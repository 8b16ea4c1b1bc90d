"""Greedy answers to prompts, in batches, and how many are exactly right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from qlora_kit.data.render import Prompt
from qlora_kit.errors import DataError
from qlora_kit.evaluate.forward import (
    NO_PROGRESS,
    CausalModel,
    base_model_of,
    context_tokens,
    evaluation_mode,
    inference_context,
)
from qlora_kit.out_of_memory import in_batches_that_fit
from qlora_kit.report.reporter import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt, and what it should have said.

    `num_new_tokens` includes the token that ended the answer; `stopped` tells whether there was
    one. `too_long` marks a prompt that leaves the model no room to answer: nothing was asked.
    """

    origin: str
    text: str
    reference: str
    num_new_tokens: int
    stopped: bool
    too_long: bool = False

    @property
    def is_exact(self) -> bool:
        return not self.too_long and self.text.strip() == self.reference.strip()


def generate_answers(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_ids: frozenset[int],
    compute_dtype: torch.dtype | None = None,
    progress: Progress = NO_PROGRESS,
) -> list[Answer]:
    """One greedy answer for each prompt, in the order of the prompts.

    Prompts of like length are answered together, padded on the left. An answer ends at one of
    `stop_ids`, at `max_new_tokens`, or where the model's context ends. `progress` counts prompts.

    Raises:
        DataError: a prompt is empty.
    """
    rooms = [_room(model, prompt, max_new_tokens) for prompt in prompts]
    answers: dict[int, Answer] = {
        i: Answer(prompts[i].origin, "", prompts[i].reference, 0, stopped=False, too_long=True)
        for i, room in enumerate(rooms)
        if room <= 0
    }
    progress.update(len(answers))
    asked = sorted(
        (i for i, room in enumerate(rooms) if room > 0),
        key=lambda i: (rooms[i], -len(prompts[i].input_ids), prompts[i].input_ids),
    )
    for room, group in groupby(asked, key=lambda i: rooms[i]):
        members = list(group)
        config = greedy_config(room, stop_ids, tokenizer.pad_token_id)
        batches = [members[at : at + batch_size] for at in range(0, len(members), batch_size)]

        def answer(batch: Sequence[int], config: GenerationConfig = config) -> list[list[int]]:
            with evaluation_mode(model), inference_context(model.device, compute_dtype):
                return _generate(model, [prompts[i] for i in batch], config)

        for batch, rows in in_batches_that_fit(batches, answer, model.device.type):
            for i, ids in zip(batch, rows, strict=True):
                answers[i] = _answer(tokenizer, prompts[i], ids, stop_ids)
            progress.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def count_exact(answers: Sequence[Answer]) -> int:
    return sum(answer.is_exact for answer in answers)


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to their reference, spaces around them apart."""
    if not answers:
        raise DataError("exact match cannot be measured: there is no prompt with a reference.")
    return count_exact(answers) / len(answers)


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


def _room(model: CausalModel, prompt: Prompt, max_new_tokens: int) -> int:
    """Tokens the answer may have; none or fewer where the prompt fills the context."""
    if not prompt.input_ids:
        raise DataError(f"{prompt.origin}: the prompt is empty, so nothing can be generated.")
    limit = context_tokens(model)
    if limit is None:
        return max_new_tokens
    return min(max_new_tokens, limit - len(prompt.input_ids))


def _generate(
    model: CausalModel, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[list[int]]:
    """New token ids of each prompt, with what follows the end still there."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    gaps = [longest - len(prompt.input_ids) for prompt in prompts]
    input_ids = torch.tensor(
        [
            [*[config.pad_token_id] * gap, *prompt.input_ids]
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


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    ids: list[int],
    stop_ids: frozenset[int],
) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    kept = ids if end is None else ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return Answer(
        origin=prompt.origin,
        text=text.strip(),
        reference=prompt.reference,
        num_new_tokens=len(kept) + (end is not None),
        stopped=end is not None,
    )
