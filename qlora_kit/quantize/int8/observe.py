"""The range of what each linear layer is given, seen on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qlora_kit.data.sequences import TokenSequence
    from qlora_kit.report.reporter import Reporter

Observer = Callable[[str, torch.Tensor], None]
"""(layer, its inputs of shape (T, I)), called once for every sequence."""


class LargestSeen:
    """The largest |x| that each layer was given; `decay` 0 keeps the maximum of all sequences.

    Otherwise an exponential moving average of each sequence's maximum, which forgets a single
    outlier: m ← decay · m + (1 - decay) · max|x|, beginning with the first one.
    """

    def __init__(self, decay: float = 0.0):
        self.decay = decay
        self.largest: dict[str, float] = {}

    def __call__(self, layer: str, inputs: torch.Tensor) -> None:
        seen = float(inputs.abs().amax())
        before = self.largest.get(layer)
        if before is None:
            self.largest[layer] = seen
        elif self.decay:
            self.largest[layer] = self.decay * before + (1 - self.decay) * seen
        else:
            self.largest[layer] = max(before, seen)


def observe(
    model: PreTrainedModel,
    layers: Sequence[str],
    sequences: Sequence[TokenSequence],
    observer: Observer,
    reporter: Reporter,
) -> None:
    """Run the model on each sequence alone, and show the observer what its layers are given."""
    num_tokens = sum(one.num_tokens for one in sequences)
    with (
        torch.no_grad(),
        _watched(model, layers, observer),
        reporter.progress("calibrating", num_tokens) as progress,
    ):
        for sequence in sequences:
            ids = torch.tensor([sequence.input_ids], device=model.device)
            model(input_ids=ids, use_cache=False)
            progress.update(sequence.num_tokens)


@contextmanager
def _watched(model: PreTrainedModel, layers: Sequence[str], observer: Observer) -> Iterator[None]:
    def hook_for(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, arguments: Any) -> None:
            inputs = arguments[0].detach()
            observer(name, inputs.reshape(-1, inputs.shape[-1]))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
