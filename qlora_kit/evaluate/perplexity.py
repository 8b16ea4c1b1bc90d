"""Perplexity: exp of the mean negative log-likelihood per supervised token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError
from qlora_kit.evaluate.windows import split_windows
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import NO_PROGRESS, token_chunks
from qlora_kit.runtime.protocol import Scorer

_MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class Perplexity:
    """`loss` is in nats per supervised token, `perplexity` its exponential."""

    loss: float
    perplexity: float
    num_tokens: int


def measure_perplexity(
    scorer: Scorer,
    sequences: Sequence[TokenSequence],
    *,
    batch_size: int,
    window_tokens: int | None,
    stride_tokens: int | None,
    progress: Progress = NO_PROGRESS,
) -> Perplexity:
    """Mean over all supervised tokens of all sequences, so that long ones weigh more.

    Longer sequences than `window_tokens` go through a sliding window; see `split_windows`.
    Batch size and order of the sequences do not matter, up to rounding in the model itself.
    `progress` counts supervised tokens.

    Raises:
        DataError: nothing is supervised.
        ModelError: the model's output is not a number.
    """
    windows = split_windows(sequences, window_tokens, stride_tokens)
    if not windows:
        raise DataError(
            f"perplexity cannot be measured: none of the {len(sequences)} sequences has a "
            "supervised token to predict."
        )
    losses: list[float] = []
    for scored in scorer.score(windows, batch_size):
        losses += token_losses(scored.logits, scored.targets)
        progress.update(len(scored.targets))
    return perplexity_of(losses)


def perplexity_of(losses: Sequence[float]) -> Perplexity:
    """From losses per token, summed exactly: the order of the tokens does not matter."""
    loss = math.fsum(losses) / len(losses)
    return Perplexity(loss, exponential(loss), len(losses))


def exponential(loss: float) -> float:
    """exp, which goes to infinity instead of failing."""
    return math.exp(loss) if loss < _MAX_EXPONENT else math.inf


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """-log p of each target, in float32: logits (tokens, vocabulary), targets (tokens,)."""
    losses: list[float] = []
    for chunk in token_chunks(*logits.shape):
        logprobs = torch.log_softmax(logits[chunk].float(), dim=-1)
        losses += (-logprobs.gather(1, targets[chunk, None]).squeeze(1)).tolist()
    return losses
