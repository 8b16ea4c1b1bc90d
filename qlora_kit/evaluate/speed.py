"""How fast a model reads and writes, with one sequence at a time, through any runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qlora_kit.errors import ModelError
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import NO_PROGRESS
from qlora_kit.runtime.protocol import Runtime

# Plain prose, in the middle of which every prompt ends, so that a model goes on writing.
_TEXT = (
    "The harbour lay quiet under a thin grey mist, and the first boats were already far out beyond "
    "the lighthouse when the old clerk opened the shutters of his office. He had kept the books of "
    "the company for thirty years, in a small upright hand, and there was not a rope, a barrel or "
    "a sack of flour in the three warehouses along the quay that he could not have found in the "
    "dark. Nobody had ever asked him whether he liked the work. On market days the farmers came "
    "down from the hills with their carts, and then the square behind the church was full of "
    "voices until late in the afternoon; he would walk there at noon, buy bread and a piece of "
    "hard cheese, and listen to them talk about rain, prices and the new railway. "
)


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    lowest: float
    highest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class SpeedPlan:
    """What is timed. A warm-up is done like the others, and not counted."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    repetitions: int = 5
    warmups: int = 1


@dataclass(frozen=True)
class Speed:
    """Tokens per second, of one sequence at a time.

    `prefill` is the prompt's tokens over the time to the first new one; `decode` the new tokens
    after that one over the time they take, None where the model ended every answer at once.
    """

    prefill: Spread
    decode: Spread | None
    prompt_tokens: int
    new_tokens: float
    """On average: a model may end its answer before the limit."""


def measure_speed(
    runtime: Runtime,
    plan: SpeedPlan,
    progress: Progress = NO_PROGRESS,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Time greedy answers to prompts of plain prose.

    Every prompt begins elsewhere in the text, as a runtime may remember the last one. `progress`
    counts answers, two to a repetition. Where the model's context has no room for the prompt and
    the answer, the prompt is shorter.

    Raises:
        ModelError: the context has no room for the answer alone.
    """
    plan = replace(plan, prompt_tokens=_room(runtime, plan))
    prompts = _prompts(runtime, plan)
    firsts: list[float] = []
    rates: list[float] = []
    lengths: list[int] = []
    for number in range(plan.warmups + plan.repetitions):
        first, _ = _timed(runtime, prompts[2 * number], 1, clock)
        progress.update()
        whole, length = _timed(runtime, prompts[2 * number + 1], plan.new_tokens, clock)
        progress.update()
        if number < plan.warmups:
            continue
        firsts.append(first)
        lengths.append(length)
        if length > 1 and whole > first:
            rates.append((length - 1) / (whole - first))
    return Speed(
        prefill=Spread.of([plan.prompt_tokens / seconds for seconds in firsts]),
        decode=Spread.of(rates) if rates else None,
        prompt_tokens=plan.prompt_tokens,
        new_tokens=statistics.fmean(lengths),
    )


def _timed(
    runtime: Runtime, prompt: Sequence[int], new_tokens: int, clock: Callable[[], float]
) -> tuple[float, int]:
    """Seconds, and how many tokens came. An answer comes as numbers, so a GPU has finished."""
    started = clock()
    [answer] = runtime.generate([prompt], new_tokens, 1)
    return clock() - started, len(answer)


def _room(runtime: Runtime, plan: SpeedPlan) -> int:
    """Tokens of a prompt that leave the model's context room for the answer."""
    limit = runtime.context_tokens
    if limit is None:
        return plan.prompt_tokens
    if plan.new_tokens >= limit:
        raise ModelError(
            f"{runtime.name} attends to {limit} tokens, which leaves no room for an answer of "
            f"{plan.new_tokens} and a prompt; time a shorter one (`compare` has --new-tokens), or "
            "none (--repetitions 0, `evaluate` without --speed)."
        )
    return min(plan.prompt_tokens, limit - plan.new_tokens)


def _prompts(runtime: Runtime, plan: SpeedPlan) -> list[list[int]]:
    ids = list(runtime.tokenizer(_TEXT, add_special_tokens=False)["input_ids"])
    count = 2 * (plan.warmups + plan.repetitions)
    ids *= 1 + (plan.prompt_tokens + 3 * count) // len(ids)
    return [ids[3 * n : 3 * n + plan.prompt_tokens] for n in range(count)]
