"""What every runtime offers, so that one measurement serves all of them.

transformers runs a folder of safetensors, llama.cpp a GGUF file, ONNX Runtime an ONNX graph. The
token ids that they are given are the same: those of the tokenizer that belongs to the artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.sequences import TokenSequence


@dataclass(frozen=True)
class Scored:
    """What a model says at the supervised tokens of one window.

    `index` is the window's place in the list that was given; `logits` has shape
    (num_tokens, vocabulary), in the dtype the model computes in; `targets` has shape (num_tokens,).
    """

    index: int
    logits: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Footprint:
    """What a model takes.

    `parameters` counts the true parameters by the form they are kept in (`nf4`, `int8`,
    `bfloat16`, `Q4_K` …): a byte that holds two 4-bit weights counts as two. `memory_bytes` is
    what the weights take in memory with all their scales, `disk_bytes` every file that is needed
    to load the model.
    """

    parameters: Mapping[str, int]
    memory_bytes: int
    disk_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(self.parameters.values())


class Scorer(Protocol):
    """What perplexity and divergence need of a model."""

    @property
    def vocab_size(self) -> int:
        """Entries of a row of logits."""

    def score(self, windows: Sequence[TokenSequence], batch_size: int) -> Iterator[Scored]:
        """Logits at the supervised tokens of every window, in any order.

        Raises:
            ModelError: logits are not a number; names the row.
        """


class Runtime(Scorer, Protocol):
    """A loaded model. Every method may be called again and again, in any order."""

    @property
    def name(self) -> str:
        """What it was opened by, as the user wrote it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    def context_tokens(self) -> int | None:
        """How many tokens it can attend to; None where nothing says."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """Greedy new token ids after each prompt, in the order of the prompts.

        Each list ends with the stop token, where there was one within `max_new_tokens`.
        """

    def footprint(self) -> Footprint: ...

    def close(self) -> None:
        """Free what it holds; nothing else may be called afterwards."""
