"""`evaluate:` what is measured on the eval sources, for base and tuned model alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

from pydantic import Field

from qlora_kit.errors import Fault
from qlora_kit.recipe.base import Spec

MetricName: TypeAlias = Literal["exact_match", "accuracy", "macro_f1", "rouge", "bleu", "chrf"]


class GenerateSpec(Spec):
    """Greedy answers to the eval prompts, compared with the reference."""

    metrics: tuple[MetricName, ...] = Field(default=("exact_match",), min_length=1)
    """What to compute from the answers. `accuracy` and `macro_f1` take the reference answers for
    labels, upper and lower case apart; an answer that is no label is wrong. `rouge` is ROUGE-1, -2
    and -L by rouge-score, `bleu` and `chrf` are those of sacrebleu."""

    max_new_tokens: int = Field(default=128, gt=0)
    """Tokens an answer may have."""

    batch_size: int = Field(default=16, gt=0)
    """Prompts answered at once."""

    max_rows: int | None = Field(default=200, gt=0)
    """Answer only the first rows of the eval sources; null answers all."""


class EvaluateSpec(Spec):
    """Measurements on the eval sources."""

    perplexity: bool = True
    """exp of the mean loss per supervised token."""

    window_tokens: int | None = Field(default=None, gt=1)
    """Length of the sliding window over long texts; unset: data.max_length."""

    stride_tokens: int | None = Field(default=None, gt=0)
    """How far the window moves; unset: half of it. Only the tokens past the overlap count."""

    generate: GenerateSpec | None = None
    """Generate and compare; unset: only perplexity. `{}` takes every default."""

    baseline: bool = True
    """Measure the base model as well, side by side."""

    def contradictions(self) -> Iterator[Fault]:
        if self.window_tokens and self.stride_tokens and self.stride_tokens > self.window_tokens:
            yield stride_fault("", self.stride_tokens, f"window_tokens ({self.window_tokens})")
        if not self.perplexity:
            for name in ("window_tokens", "stride_tokens"):
                if getattr(self, name) is not None:
                    yield Fault(name, "has no effect with perplexity: false", "remove one of them")


def stride_fault(prefix: str, stride_tokens: int, window: str) -> Fault:
    """A stride longer than its window, wherever the window's length comes from."""
    return Fault(
        f"{prefix}stride_tokens",
        f"{stride_tokens} is longer than {window}, so tokens between windows would never be "
        "measured",
        "make it at most the window",
    )
