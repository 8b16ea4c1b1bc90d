"""Greedy answers to prompts, in batches, and how many are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qlora_kit.data.render import Prompt
from qlora_kit.errors import DataError
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import NO_PROGRESS
from qlora_kit.runtime.protocol import Runtime


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
    runtime: Runtime,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress = NO_PROGRESS,
) -> list[Answer]:
    """One greedy answer for each prompt, in the order of the prompts.

    Prompts of like length are answered together. An answer ends at one of the runtime's stop
    tokens, at `max_new_tokens`, or where the model's context ends. `progress` counts prompts.

    Raises:
        DataError: a prompt is empty.
    """
    rooms = [_room(runtime, prompt, max_new_tokens) for prompt in prompts]
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
        for batch in (members[at : at + batch_size] for at in range(0, len(members), batch_size)):
            rows = runtime.generate([prompts[i].input_ids for i in batch], room, batch_size)
            for i, ids in zip(batch, rows, strict=True):
                answers[i] = _answer(runtime, prompts[i], ids)
            progress.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def count_exact(answers: Sequence[Answer]) -> int:
    return sum(answer.is_exact for answer in answers)


def exact_match(answers: Sequence[Answer]) -> float:
    """Share of answers equal to their reference, spaces around them apart."""
    if not answers:
        raise DataError("exact match cannot be measured: there is no prompt with a reference.")
    return count_exact(answers) / len(answers)


def _room(runtime: Runtime, prompt: Prompt, max_new_tokens: int) -> int:
    """Tokens the answer may have; none or fewer where the prompt fills the context."""
    if not prompt.input_ids:
        raise DataError(f"{prompt.origin}: the prompt is empty, so nothing can be generated.")
    limit = runtime.context_tokens
    if limit is None:
        return max_new_tokens
    return min(max_new_tokens, limit - len(prompt.input_ids))


def _answer(runtime: Runtime, prompt: Prompt, ids: list[int]) -> Answer:
    stopped = bool(ids) and ids[-1] in runtime.stop_ids
    text = runtime.tokenizer.decode(
        ids[:-1] if stopped else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return Answer(
        origin=prompt.origin,
        text=text.strip(),
        reference=prompt.reference,
        num_new_tokens=len(ids),
        stopped=stopped,
    )
