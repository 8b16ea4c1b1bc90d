"""How far one model is from another, token by token: KL, agreement, log-probabilities.

The two need not be in memory together: what the reference says is recorded on disk, and the
candidate is compared with the record.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.errors import DataError, HardwareError, ModelError
from qlora_kit.evaluate.perplexity import perplexity_of
from qlora_kit.evaluate.windows import keep_first_tokens, split_windows
from qlora_kit.refusals import naming
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import NO_PROGRESS, token_chunks
from qlora_kit.runtime.protocol import Scorer

DEFAULT_MAX_TOKENS = 4096
"""A record takes 4 bytes per token and vocabulary entry: 0.8 GB for 4096 tokens of 49152."""


@dataclass(frozen=True)
class Divergence:
    """A candidate measured against a reference, over the same supervised tokens.

    `kl_mean` and `kl_max` are KL(reference || candidate) per token, over the whole vocabulary,
    in nats. `top1_agreement` is the share of tokens at which both would say the same.
    `max_abs_delta_logp` is the largest |Δ log p| of a label. Losses are in nats per token.
    """

    kl_mean: float
    kl_max: float
    top1_agreement: float
    max_abs_delta_logp: float
    reference_loss: float
    candidate_loss: float
    reference_perplexity: float
    candidate_perplexity: float
    num_tokens: int


@dataclass(frozen=True)
class Recorded:
    """A reference's logits on disk, as float32 of shape (num_tokens, vocab_size).

    `windows` are what they belong to, in the order of the rows. `num_available` is how many
    supervised tokens there were before the cap.
    """

    path: Path
    windows: tuple[TokenSequence, ...]
    num_tokens: int
    num_available: int
    vocab_size: int


def record_logprobs(
    scorer: Scorer,
    sequences: Sequence[TokenSequence],
    folder: Path,
    *,
    batch_size: int,
    window_tokens: int | None = None,
    stride_tokens: int | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    progress: Progress = NO_PROGRESS,
) -> Recorded:
    """Write what the reference says at the first `max_tokens` supervised tokens into `folder`.

    Logits are kept rather than log-probabilities: they lose nothing. The file is the caller's
    to delete. `progress` counts supervised tokens.

    Raises:
        DataError: nothing is supervised.
        HardwareError: the disk has no room.
        ModelError: the model's output is not a number.
    """
    available = split_windows(sequences, window_tokens, stride_tokens)
    windows = keep_first_tokens(available, max_tokens)
    starts = _row_starts(windows)
    path = folder / "reference-logits.npy"
    rows: numpy.memmap | None = None
    for scored in scorer.score(windows, batch_size):
        if rows is None:
            rows = _create_record(path, starts[-1], scored.logits.shape[-1])
        start, end = starts[scored.index], starts[scored.index + 1]
        rows[start:end] = scored.logits.float().cpu().numpy()
        progress.update(end - start)
    assert rows is not None
    rows.flush()
    return Recorded(
        path=path,
        windows=tuple(windows),
        num_tokens=starts[-1],
        num_available=sum(window.num_supervised for window in available),
        vocab_size=rows.shape[1],
    )


def compare_to_recorded(
    scorer: Scorer,
    recorded: Recorded,
    *,
    batch_size: int,
    num_entries: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Divergence:
    """Measure a candidate against a record, on the very windows that were recorded.

    `num_entries` are how many entries of the vocabulary to compare, from its start: two models
    may be padded to different sizes, with entries that no token has. None compares all.

    Raises:
        ModelError: the vocabularies differ in size, or the model's output is not a number.
    """
    rows = numpy.load(recorded.path, mmap_mode="r")
    starts = _row_starts(recorded.windows)
    tally = _Tally(num_entries)
    for scored in scorer.score(recorded.windows, batch_size):
        stored = rows[starts[scored.index] : starts[scored.index + 1]]
        reference = torch.from_numpy(numpy.array(stored)).to(scored.logits.device)
        tally.add(reference, scored.logits, scored.targets)
        progress.update(len(scored.targets))
    return tally.result()


def measure_divergence(
    reference: Scorer,
    candidate: Scorer,
    sequences: Sequence[TokenSequence],
    *,
    batch_size: int,
    window_tokens: int | None = None,
    stride_tokens: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Divergence:
    """The same with both models in memory; nothing is written, so nothing need be capped.

    They must be two models that score in the same order, as those of one runtime do: one whose
    adapter is turned on and off has to be recorded first.
    """
    windows = split_windows(sequences, window_tokens, stride_tokens)
    if max_tokens is not None:
        windows = keep_first_tokens(windows, max_tokens)
    _row_starts(windows)
    tally = _Tally()
    both = reference.score(windows, batch_size), candidate.score(windows, batch_size)
    for one, other in zip(*both, strict=True):
        assert one.index == other.index, "both models must be given the same batches"
        tally.add(one.logits.to(other.logits.device), other.logits, other.targets)
        progress.update(len(other.targets))
    return tally.result()


@dataclass
class _Tally:
    """Figures per token; summed exactly at the end, so their order does not matter."""

    num_entries: int | None = None
    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    candidate_losses: list[float] = field(default_factory=list)

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits of both, (tokens, vocabulary); compared in float64."""
        reference, candidate = (one[:, : self.num_entries] for one in (reference, candidate))
        if reference.shape != candidate.shape:
            raise ModelError(
                f"the two models cannot be compared: one has {reference.shape[1]} entries in its "
                f"vocabulary, the other {candidate.shape[1]}."
            )
        for chunk in token_chunks(*reference.shape):
            log_p = torch.log_softmax(reference[chunk].double(), dim=-1)
            log_q = torch.log_softmax(candidate[chunk].double(), dim=-1)
            p = log_p.exp()
            # A token the reference rules out adds nothing, whatever the candidate makes of it.
            terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
            # Rounding can leave a sum of zero a hair below it, where no KL lies.
            self.kl += terms.sum(-1).clamp_min(0.0).tolist()
            self.agrees += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
            labels = targets[chunk, None]
            self.reference_losses += (-log_p.gather(1, labels)).squeeze(1).tolist()
            self.candidate_losses += (-log_q.gather(1, labels)).squeeze(1).tolist()

    def result(self) -> Divergence:
        reference = perplexity_of(self.reference_losses)
        candidate = perplexity_of(self.candidate_losses)
        pairs = zip(self.reference_losses, self.candidate_losses, strict=True)
        return Divergence(
            kl_mean=math.fsum(self.kl) / len(self.kl),
            kl_max=max(self.kl),
            top1_agreement=sum(self.agrees) / len(self.agrees),
            max_abs_delta_logp=max(abs(one - other) for one, other in pairs),
            reference_loss=reference.loss,
            candidate_loss=candidate.loss,
            reference_perplexity=reference.perplexity,
            candidate_perplexity=candidate.perplexity,
            num_tokens=reference.num_tokens,
        )


def _row_starts(windows: Sequence[TokenSequence]) -> list[int]:
    """First row of each window, and the total at the end."""
    starts = [0]
    for window in windows:
        starts.append(starts[-1] + window.num_supervised)
    if starts[-1] == 0:
        raise DataError("two models cannot be compared on data without a supervised token.")
    return starts


def _create_record(path: Path, num_tokens: int, vocab_size: int) -> numpy.memmap:
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = num_tokens * vocab_size * 4
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise HardwareError(
            f"comparing two models on {num_tokens} tokens needs {num_bytes:,} bytes of disk "
            f"in {path.parent}, where {free:,} are free; make room or compare fewer."
        )
    with naming(path):
        rows = numpy.lib.format.open_memmap(
            path, mode="w+", dtype=numpy.float32, shape=(num_tokens, vocab_size)
        )
        _reserve(path)
    return rows


def _reserve(path: Path) -> None:
    """A disk that fills up meanwhile would end the process where it writes to mapped memory."""
    if sys.platform == "linux":
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
