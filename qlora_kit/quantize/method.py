"""What a way of quantizing is to the straight line in `quantize.py`.

A method is a module with a function `method(name) -> Method`, named in `methods.py`. Its
functions are called in this order, and none of them prints or publishes anything:

1. `calibration(options)`: does it take calibration text with these options?
2. `check(source, options)`: raise what is at fault, before any work and from the skeleton alone;
3. `try_small(source, options)`: let the library, if it may fail on an architecture, do its work on
   a small model of the same one, in seconds;
4. `predict_bytes(source, options)`: room that the draft will need on the disk;
5. `make(source, options, calibration, draft, reporter)`: fill the empty folder `draft` with
   files, none of them in a folder of its own: all that is needed to load the result, tokenizer
   and configuration included.

The straight line reloads what was made, compares it with its source and publishes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict

from qlora_kit.recipe.base import Spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.environment import Hardware
    from qlora_kit.model.skeleton import Skeleton
    from qlora_kit.report.reporter import Reporter

CalibrationNeed = Literal["none", "optional", "required"]


class MethodOptions(Spec):
    """The options of a method; the docstring under each field is its help.

    They are given as `key=value`, and validated strictly: a whole number is written as one.
    """

    model_config = ConfigDict(title="options")


@dataclass(frozen=True)
class Source:
    """The model that is quantized: a folder of plain 16- or 32-bit weights that passed its checks.

    Its weights are whole, finite, and fit its configuration.
    """

    name: str
    """What the user called it."""
    folder: Path
    skeleton: Skeleton
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    """Of most of its stored weights."""
    fingerprint: str
    """`WeightScan.fingerprint` of its weights."""
    stored_bytes: int
    """Of its weights on disk."""
    hardware: Hardware
    hub_id: str | None = None
    """`ModelSource.hub_id` of it."""
    allow_pickle: bool = False
    trust_remote_code: bool = False
    is_rounding_told: bool = False
    """Whether the caller tells the user himself what it costs to round these weights again."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.skeleton.model.parameters())


@dataclass(frozen=True)
class Calibration:
    """Text that a method may look at, as tokens; disjoint from what the result is measured on."""

    sequences: tuple[TokenSequence, ...]
    num_tokens: int
    description: str
    """Where it comes from and how it was drawn, for a person and for the certificate."""
    tokens_by_source: Mapping[str, int] = field(default_factory=dict)
    """How many of them each source gave."""


@dataclass(frozen=True)
class Made:
    """What a method has put into the draft folder."""

    open: str = "."
    """What in the draft `runtime.open.open_runtime` is given: the folder itself, or a file."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    """JSON values for the certificate, under the method's own keys."""
    notes: tuple[str, ...] = ()
    """What a person should know, said after the work."""
    finish: Callable[[Path], None] | None = None
    """Done to the draft when it has been compared, before it is published: for what would keep
    this very machine from loading it."""


@dataclass(frozen=True)
class Method:
    """One way of quantizing. `O` below stands for an instance of `options`."""

    name: str
    """As the user writes it: `nf4`, `gguf:Q4_K_M`."""
    options: type[MethodOptions]
    check: Callable[[Source, Any], None]
    """(source, O). Raises QloraKitError."""
    predict_bytes: Callable[[Source, Any], int]
    """(source, O). An upper bound for the disk, drafts of the method's own included."""
    make: Callable[[Source, Any, Calibration | None, Path, Reporter], Made]
    """(source, O, calibration, draft, reporter). Shows its progress through the reporter."""
    calibration: Callable[[Any], CalibrationNeed] = lambda options: "none"
    """(O). What it does with calibration text."""
    try_small: Callable[[Source, Any], str] = lambda source, options: ""
    """(source, O). Returns why nothing could be tried, or nothing. Raises ModelError: the library
    cannot follow this architecture."""
