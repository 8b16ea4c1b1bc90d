"""`data:` what is trained and evaluated on."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec

FILE_ENDINGS = (".json", ".jsonl", ".txt")


class SourceSpec(Spec):
    """One source of rows."""

    path: str = Field(min_length=1)
    """A `.json` or `.jsonl` file, a `.txt` file, a hub id, or `demo/commands`."""

    split: str = Field(default="train", min_length=1)
    """Split of a hub data set or of the demo task; a local file has only `train`."""

    max_rows: int | None = Field(default=None, gt=0)
    """Use only the first rows of the source."""

    def contradictions(self) -> Iterator[Fault]:
        if self.path.endswith(FILE_ENDINGS) and self.split != "train":
            yield Fault(
                "split",
                f"a file is not divided into splits, got '{self.split}'",
                "remove it, and name a file for each part",
            )


class DataSpec(Spec):
    """Rows, how they become tokens, and which of those are trained on."""

    train: tuple[SourceSpec, ...] = Field(min_length=1)
    """Sources of training rows."""

    eval: tuple[SourceSpec, ...] = ()
    """Held-out sources, for evaluation and for certifying a merge."""

    max_length: int = Field(default=1024, ge=8)
    """Tokens a sequence may have."""

    loss_on: Literal["assistant", "all"] = "assistant"
    """Train on what the assistant says and its end-of-turn token, or on every token."""

    overlength: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a row longer than max_length. It is counted and shown whichever it is.
    A plain text is split into several sequences instead, and loses nothing."""

    max_dropped_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the rows that may be dropped or truncated before the run stops instead."""

    def contradictions(self) -> Iterator[Fault]:
        held_out = {_identity(source) for source in self.eval}
        for number, source in enumerate(self.train):
            if _identity(source) in held_out:
                yield Fault(
                    f"train.{number}",
                    f"{source.path} (split {source.split}) is also an eval source",
                    "hold out different rows",
                )


def _identity(source: SourceSpec) -> tuple[str, str]:
    return posixpath.normpath(source.path), source.split
