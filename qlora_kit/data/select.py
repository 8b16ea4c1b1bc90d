"""Which sound rows are used: not those that are there twice, held out, or also eval rows."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from qlora_kit.data.examples import AnyExample, Conversation
from qlora_kit.data.schemas import content_key
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from qlora_kit.recipe import DataSpec

DUPLICATE = "the same as an earlier row"
LEAK = "also an eval row"
HELD_OUT = "held out for evaluation"
NOT_HELD_OUT = "trained on, not held out"

_RANGE = 1 << 64


@dataclass
class Selection:
    """Decides on rows one by one, in order; remembers a digest and the origin of each."""

    spec: DataSpec
    part: Literal["train", "eval"]
    eval_keys: frozenset[bytes] = frozenset()
    """Of the eval rows, where training rows must not be among them."""
    threshold: int | None = None
    """Rows whose lot is below it are held out; None where nothing is."""
    _seen: dict[bytes, str] = field(default_factory=dict)
    """What rows say, and which of their turns they train, with the origin of the first."""

    def rule_against(self, example: AnyExample) -> str | None:
        """Why a row is not used; None where it is.

        Raises:
            DataError: the recipe says that there must be no such row.
        """
        may_repeat = self.spec.duplicates == "keep" or (
            self.part == "eval" and self.threshold is None
        )
        if may_repeat and self.threshold is None and not self.eval_keys:
            return None
        key = content_key(example)
        if self.threshold is not None:
            is_held = lot(key, self.spec.seed) < self.threshold
            if is_held != (self.part == "eval"):
                return HELD_OUT if is_held else NOT_HELD_OUT
        if self.part == "train" and key in self.eval_keys and self.spec.leaks != "keep":
            self._refuse("leaks", example.origin, "an eval row")
            return LEAK
        if may_repeat:
            return None
        key += _trained_turns(example)
        first = self._seen.get(key)
        if first is None:
            self._seen[key] = example.origin
            return None
        self._refuse("duplicates", example.origin, first)
        return DUPLICATE

    def first_of(self, example: AnyExample) -> str | None:
        """The origin of the first row that says the same, among those decided on."""
        return self._seen.get(content_key(example) + _trained_turns(example))

    def _refuse(self, name: Literal["leaks", "duplicates"], origin: str, same_as: str) -> None:
        if getattr(self.spec, name) == "error":
            raise DataError(
                f"{origin} is the same as {same_as}, and data.{name} is error. Remove it, or set "
                f"data.{name} to drop or keep."
            )


def _trained_turns(example: AnyExample) -> bytes:
    """Which turns a row itself says to train: two rows may say the same and teach another part."""
    if not isinstance(example, Conversation):
        return b""
    flags = [message.train for message in example.messages]
    if not example.num_given and flags.count(None) == len(flags):
        return b""
    return repr((example.num_given, flags)).encode()


def lot(key: bytes, seed: int) -> int:
    """A number below 2**64 that depends on what a row says and the seed, and on nothing else.

    So the same rows are held out whatever else is in the files, and a row that is there twice is
    never on both sides.
    """
    digest = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


def held_out_threshold(spec: DataSpec, examples: Iterable[AnyExample]) -> int:
    """The lot below which a row is held out: a share of all lots, or that of the n-th row."""
    assert spec.held_out is not None
    if spec.held_out < 1:
        return int(spec.held_out * _RANGE)
    count = int(spec.held_out)
    lots = {lot(content_key(example), spec.seed) for example in examples}
    if len(lots) <= count:
        raise DataError(
            f"data.held_out is {count}, but there are only {len(lots)} different training rows; "
            "hold out fewer."
        )
    return heapq.nsmallest(count, lots)[-1] + 1
