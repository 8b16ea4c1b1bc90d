"""Rows rendered in chunks, the tokenizer at work on one while the next is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.examples import Conversation, PromptCompletion
from qlora_kit.data.render import Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.examples import Example
    from qlora_kit.data.mark import LossOn
    from qlora_kit.data.sequences import Rendered

_CHUNK_ROWS = 512
_CHUNKS_AHEAD = 2
# Of the texts of a chunk, unless a single row has more.
_CHUNK_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Chunk:
    """Examples with the numbers of their sources, and what each was rendered to."""

    groups: list[int]
    examples: list[Example]
    rendered: Rendered


def rendered_chunks(
    rows: Iterator[tuple[int, Example]], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[Chunk]:
    """All rows in order; each comes with the number of its source."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[Future[None], Rendering, list[int], list[Example]]] = []
        for chunk in _chunks(rows):
            groups, examples = [group for group, _ in chunk], [one for _, one in chunk]
            rendering = Rendering(examples, tokenizer, loss_on)
            waiting.append((pool.submit(rendering.encode), rendering, groups, examples))
            if len(waiting) > _CHUNKS_AHEAD:
                yield _finished(*waiting.pop(0))
        for one in waiting:
            yield _finished(*one)


def _chunks(rows: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    """Rows in order, as many at a time as are worth a batch and do not fill the memory."""
    chunk: list[tuple[int, Example]] = []
    characters = 0
    for row in rows:
        size = _num_characters(row[1])
        if chunk and (len(chunk) == _CHUNK_ROWS or characters + size > _CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(row)
        characters += size
    if chunk:
        yield chunk


def _num_characters(example: Example) -> int:
    if isinstance(example, Conversation):
        return sum(len(message.content) for message in example.messages)
    if isinstance(example, PromptCompletion):
        return len(example.prompt) + len(example.completion)
    return len(example.text)


def _finished(
    future: Future[None], rendering: Rendering, groups: list[int], examples: list[Example]
) -> Chunk:
    future.result()
    return Chunk(groups, examples, rendering.label())
