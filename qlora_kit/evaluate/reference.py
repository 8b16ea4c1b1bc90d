"""What is kept on disk of the model that others are compared with, for processes of their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.evaluate.divergence import Recorded
from qlora_kit.evaluate.vocabulary import token_of, vocabulary_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.runtime.protocol import Runtime

_FILE = "reference.json"


@dataclass(frozen=True)
class Reference:
    """The record, and the tokens that its entries stand for."""

    name: str
    recorded: Recorded
    tokens: dict[int, str]

    def save(self, folder: Path) -> None:
        """Beside the record itself."""
        windows = [(one.input_ids, one.labels, one.origin) for one in self.recorded.windows]
        values = {
            "name": self.name,
            "path": str(self.recorded.path),
            "windows": windows,
            "num_available": self.recorded.num_available,
            "vocab_size": self.recorded.vocab_size,
            "tokens": self.tokens,
        }
        (folder / _FILE).write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Reference:
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        windows = tuple(
            TokenSequence(tuple(ids), tuple(labels), origin)
            for ids, labels, origin in values["windows"]
        )
        recorded = Recorded(
            path=Path(values["path"]),
            windows=windows,
            num_tokens=sum(one.num_supervised for one in windows),
            num_available=values["num_available"],
            vocab_size=values["vocab_size"],
        )
        return cls(values["name"], recorded, {int(i): t for i, t in values["tokens"].items()})

    @classmethod
    def of(cls, runtime: Runtime, recorded: Recorded) -> Reference:
        return cls(runtime.name, recorded, token_of(runtime.tokenizer))

    def difference_from(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
        """Why another model's predictions cannot be compared with the record; None if they can."""
        found = vocabulary_difference(self.tokens, token_of(tokenizer))
        if found is not None:
            return found
        largest = max(max(one.input_ids) for one in self.recorded.windows)
        if largest >= vocab_size:
            return f"it has {vocab_size} entries in its vocabulary, and the rows use {largest}"
        return None

    def shared_entries(self, vocab_size: int) -> int | None:
        """How many entries both have, where one is padded further; None where they are alike."""
        if vocab_size == self.recorded.vocab_size:
            return None
        return min(vocab_size, self.recorded.vocab_size)
