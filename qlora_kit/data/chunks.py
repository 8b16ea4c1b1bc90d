"""Rows rendered in chunks, the tokenizer at work on one while the next is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from qlora_kit.data.render import Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.examples import Example
    from qlora_kit.data.mark import LossOn
    from qlora_kit.data.sequences import Rendered

_CHUNK_ROWS = 512
_CHUNKS_AHEAD = 2


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
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            groups, examples = [group for group, _ in chunk], [one for _, one in chunk]
            rendering = Rendering(examples, tokenizer, loss_on)
            waiting.append((pool.submit(rendering.encode), rendering, groups, examples))
            if len(waiting) > _CHUNKS_AHEAD:
                yield _finished(*waiting.pop(0))
        for one in waiting:
            yield _finished(*one)


def _finished(
    future: Future[None], rendering: Rendering, groups: list[int], examples: list[Example]
) -> Chunk:
    future.result()
    return Chunk(groups, examples, rendering.label())
