"""`data:` what is trained and evaluated on."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec, without_effect

FileFormat = Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "arrow", "text"]
SchemaName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "text",
    "label",
    "preference",
    "kto",
]
Role = Literal["system", "user", "assistant", "tool"]
Name = Annotated[str, Field(min_length=1)]
PartName = Literal["train", "eval"]

_DEMO = "demo/commands"
# Schemas whose rows are always conversations.
_TEMPLATED = {"messages", "sharegpt", "alpaca", "label"}

# Endings of files that are read, apart from .gz and .zst behind them.
FILE_ENDINGS = (
    ".json",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".txt",
)
COMPRESSED_ENDINGS = (".gz", ".zst")


def looks_like_file(path: str) -> bool:
    """Whether a source's path can only be a file, by its ending; a hub id has none of these."""
    name = path.lower()
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return name.endswith(FILE_ENDINGS) or name != path.lower()


class SourceSpec(Spec):
    """One source of rows."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob (`rows/*.jsonl.gz`), a hub id, or `demo/commands`. Files are
    .json, .jsonl, .csv, .tsv, .parquet, .arrow or .txt, each also as .gz or .zst."""

    split: str = Field(default="train", min_length=1)
    """Split of a hub data set, of a folder whose files are named after splits, or of the demo
    task; a file has only `train`."""

    config: str | None = Field(default=None, min_length=1)
    """Configuration of a hub data set, where it has several."""

    max_rows: int | None = Field(default=None, gt=0)
    """Use only the first rows of the source."""

    format: FileFormat = "auto"
    """File format; `auto` goes by the content, then by the name."""

    text_rows: Literal["file", "paragraph", "line"] = "file"
    """What one row of a .txt file is; paragraphs are parted by blank lines."""

    type: SchemaName = "auto"
    """Schema of the rows; `auto` recognises it by their keys."""

    columns: dict[Name, Name] = Field(default_factory=dict)
    """Where a row keeps what its schema calls otherwise: `{instruction: task, output: answers.0}`.
    Dots lead into objects and lists."""

    weight: float | None = Field(default=None, gt=0)
    """How often to draw from this source, relative to the others; with data.mix."""

    num_rows: int | None = Field(default=None, gt=0)
    """Draw this many rows in random order, some again where the source has fewer."""

    @property
    def name(self) -> str:
        """The path, with the split where it is not the usual one."""
        return self.path if self.split == "train" else f"{self.path} ({self.split})"

    def contradictions(self) -> Iterator[Fault]:
        if looks_like_file(self.path) and self.split != "train" and "*" not in self.path:
            yield Fault(
                "split",
                f"a file is not divided into splits, got '{self.split}'",
                "remove it, and name a file for each part",
            )
        if looks_like_file(self.path):
            yield from without_effect(self, ("config",), "on a file", "remove it")


class DataSpec(Spec):
    """Rows, how they become tokens, and which of those are trained on."""

    train: tuple[SourceSpec, ...] = Field(min_length=1)
    """Sources of training rows."""

    eval: tuple[SourceSpec, ...] = ()
    """Held-out sources, for evaluation and for certifying a merge."""

    held_out: float | None = Field(default=None, gt=0)
    """Hold out this share (below 1) or number of the training rows, where `eval` names none."""

    mix: Literal["concatenate", "first_exhausted", "all_exhausted"] = "concatenate"
    """How several training sources are joined: one after the other, or drawn from by their
    weights until the first, or each, has given all its rows."""

    max_length: int = Field(default=1024, ge=8)
    """Tokens a sequence may have."""

    packing: bool = False
    """Put several examples into one sequence of max_length, isolated from each other."""

    padding_free: Literal["auto"] | bool = "auto"
    """Put a batch's examples into one row, isolated from each other, so that nothing is padded.
    `auto` does so with the attention kernels that are told where examples end (flash, flex), and
    with torch's SDPA where it is given each example by itself: on a CPU, and on a GPU in 16 bits by
    one call of torch's own FlashAttention, which is tried first."""

    loss_on: Literal["assistant", "last", "all"] | tuple[Role, ...] = "assistant"
    """Train on what the assistant says and its end-of-turn token, on its last turn only, on
    every token, or on what the listed roles say. `train: false` on a message leaves it out."""

    split_special_tokens: bool = True
    """Whether a special token spelled in plain text, or in a prompt and its completion, stays
    text. Set false for data that are already rendered in a chat format, so that what is spelled
    becomes the tokens. What is spelled in a message is always text."""

    overlength: Literal["drop", "truncate", "split", "error"] = "drop"
    """What happens to a row longer than max_length. It is counted and shown whichever it is.
    A plain text is always split into several sequences, and loses nothing."""

    max_dropped_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the rows that may be bad or too long before the run stops instead; rows that
    overlength truncates or splits do not count."""

    duplicates: Literal["drop", "keep", "error"] = "drop"
    """What happens to a training row that is exactly the same as an earlier one."""

    leaks: Literal["drop", "keep", "error"] = "drop"
    """What happens to a training row that is also an eval row; the eval row stays."""

    streaming: bool = False
    """Read and render while training, for data that do not fit the disk; needs train.max_steps."""

    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seeds drawing, mixing and holding out."""

    @property
    def has_eval_rows(self) -> bool:
        return bool(self.eval) or self.held_out is not None

    def contradictions(self) -> Iterator[Fault]:
        held_out = {_identity(source) for source in self.eval}
        for number, source in enumerate(self.train):
            if _identity(source) in held_out:
                yield Fault(
                    f"train.{number}",
                    f"{source.path} (split {source.split}) is also an eval source",
                    "hold out different rows",
                )
            if source.weight is not None and self.mix == "concatenate":
                yield Fault(
                    f"train.{number}.weight",
                    "has no effect with mix: concatenate",
                    "set data.mix: all_exhausted, or give num_rows",
                )
        if self.packing:
            yield from without_effect(self, ("padding_free",), "with packing: true", "remove it")
        if self.held_out is not None and self.eval:
            yield Fault("held_out", "eval names its own rows", "remove one of the two")
        if self.held_out is not None and self.held_out >= 1 and self.held_out % 1:
            message = f"must be whole from 1 on, got {self.held_out:g}"
            yield Fault("held_out", message, "below 1 it is a share of the rows")
        types = {"messages" if one.path == _DEMO else one.type for one in (*self.train, *self.eval)}
        if types <= _TEMPLATED:
            why = f"on {' and '.join(sorted(types))}, of which the chat template writes all"
            yield from without_effect(self, ("split_special_tokens",), why, "remove it")
        if self.loss_on == ():
            yield Fault("loss_on", "must name at least one role", "try assistant")


def _identity(source: SourceSpec) -> tuple[str, str]:
    return posixpath.normpath(source.path), source.split
