"""What a schema is: the keys that name it, and how a row of it is read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.examples import AnyExample
from qlora_kit.data.rows import Record
from qlora_kit.data.schemas.fields import Unfit, is_filled
from qlora_kit.recipe.data import SchemaName

MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")

MINDED_TOOLS = ("tools", "functions", "function")
"""Under which a row lists functions; a schema that minds them reads them or refuses the row."""

CONTEXT_KEYS = (
    "background",
    "choices",
    "context",
    "document",
    "history",
    "hypothesis",
    "options",
    "passage",
    "premise",
    "reasoning",
    "reasoning_content",
    "sentence1",
    "sentence2",
    "system",
    "system_message",
    "system_prompt",
    "thinking",
)
"""What a question or its answer may hang on; a schema of single texts has no place for these."""


@dataclass(frozen=True)
class Rules:
    """How rows are read, beside their schema.

    `needs_answer` is false where every token is trained on; `mapped` are the fields that a
    column mapping fills, which go before all that might be meant otherwise.
    `split_special_tokens` is what `data.split_special_tokens` says.
    """

    needs_answer: bool = True
    mapped: frozenset[str] = frozenset()
    split_special_tokens: bool = True


@dataclass(frozen=True)
class Schema:
    """A layout of rows.

    A row has it when each of `slots` has one of its keys there, and `also_fits` agrees.
    `reads` are all keys that are read; `minds` are those whose loss would change the meaning.
    """

    name: SchemaName
    layout: str
    slots: tuple[tuple[str, ...], ...]
    reads: frozenset[str]
    read: Callable[[Record, str, Rules], AnyExample]
    minds: tuple[str, ...] = ()
    also_fits: Callable[[Record, Collection[str]], bool] | None = None

    def fits(self, record: Record, present: Collection[str]) -> bool:
        """Whether the keys that are `present` are of this schema."""
        for slot in self.slots:
            if not any(key in present for key in slot):
                return False
        return self.also_fits is None or self.also_fits(record, present)

    def missing(self, present: Collection[str]) -> list[str]:
        """A name for each slot that no key fills."""
        return [slot[0] for slot in self.slots if not any(key in present for key in slot)]

    def naming(self, present: Collection[str]) -> list[str]:
        """The keys by which a row is known to be of this schema."""
        return [key for slot in self.slots for key in slot if key in present]

    def unread(self, keys: Collection[str]) -> list[str]:
        """Keys that change what a row means, and that this schema does not read."""
        minded = {*MEDIA_KEYS, *self.minds} - self.reads
        return [key for key in keys if key in minded]


def refuse_unread(record: dict[str, Any], keys: Collection[str]) -> None:
    """Raise Unfit where one of the keys says anything; the name of a function says nothing."""
    for key in keys:
        value = record[key]
        if is_filled(value) and not (key == "function" and isinstance(value, str)):
            detail = (
                "rows of this schema do not have it; leave it out, or say with columns what it is"
            )
            raise Unfit(f"no place for {key}", detail)
