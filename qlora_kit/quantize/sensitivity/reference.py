"""A model in reference precision, and what it says: what every other way is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_kit.data.sequences import TokenSequence
from qlora_kit.evaluate.divergence import (
    Divergence,
    Recorded,
    compare_to_recorded,
    record_logprobs,
)
from qlora_kit.quantize.rounding import Rounding, image_of
from qlora_kit.quantize.sensitivity.units import NO_BLOCK, block_of
from qlora_kit.report.reporter import Progress
from qlora_kit.runtime.forward import NO_PROGRESS, CausalScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 8
# What blocks hand on is kept in memory up to this size; beyond it every forward pass is whole.
_KEPT_BYTES = 2 * 1024**3


class Reference:
    """A model whose weights can be swapped for others, and its recorded logits.

    A change in one block leaves what the blocks before it say as it was, so that is kept, and a
    forward pass begins at the first block that has changed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Sequence[TokenSequence],
        folder: Path,
        pad_token_id: int,
        compute_dtype: torch.dtype,
        progress: Progress = NO_PROGRESS,
    ):
        """Record what `model` says into `folder`; about 4 bytes a token and vocabulary entry."""
        self.model = model
        self._scorer = CausalScorer(model, pad_token_id, compute_dtype)
        self._blocks = _Blocks(model, windows)
        num_tokens = sum(window.num_supervised for window in windows)
        with self._blocks.recording():
            self.recorded: Recorded = record_logprobs(
                self._scorer,
                windows,
                folder,
                batch_size=BATCH_SIZE,
                max_tokens=num_tokens,
                progress=progress,
            )
        self._trust_blocks()

    @property
    def reuses_blocks(self) -> bool:
        """Whether forward passes begin at the first block that has changed."""
        return self._blocks.are_reused

    def measure(self, images: Mapping[str, torch.Tensor]) -> Divergence:
        """The divergence of the model with the weights of these modules replaced.

        Every weight is put back as it was, the very tensor.
        """
        with replaced(self.model, images), self._blocks.beginning_at(images):
            return compare_to_recorded(self._scorer, self.recorded, batch_size=BATCH_SIZE)

    def measure_rounded(self, roundings: Mapping[str, Rounding]) -> Divergence:
        """The same with every module's weight rounded as said, an image at a time in memory only
        where there is one of them.
        """
        return self.measure(
            {
                name: image_of(self.model.get_submodule(name), rounding)
                for name, rounding in roundings.items()
                if rounding.kind != "none"
            }
        )

    def _trust_blocks(self) -> None:
        """Architectures may hand on more than a block's output; then the whole model is run."""
        if self._blocks.are_reused:
            with self._blocks.beginning_at_last():
                again = compare_to_recorded(self._scorer, self.recorded, batch_size=BATCH_SIZE)
            if again.kl_max > 0 or again.max_abs_delta_logp > 0:
                self._blocks.forget()


@contextmanager
def replaced(model: nn.Module, images: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The weights of these modules swapped for others while the context lasts."""
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in images}
    kept = {name: weight.data for name, weight in weights.items()}
    try:
        for name, image in images.items():
            assert image.shape == kept[name].shape, name
            weights[name].data = image
        yield
    finally:
        for name, weight in weights.items():
            weight.data = kept[name]


class _Blocks:
    """The blocks of a model, and what they said in the reference."""

    def __init__(self, model: PreTrainedModel, windows: Sequence[TokenSequence]):
        self._model = model
        self._name, self._list = _find_blocks(model)
        config = model.config.get_text_config()
        num_cells = sum(len(window.input_ids) for window in windows) * config.hidden_size
        fits = num_cells * len(self._list) * 4 <= _KEPT_BYTES
        self.are_reused = len(self._list) > 1 and fits
        self._batch: bytes = b""
        self._said: dict[bytes, dict[int, Any]] = {}

    def forget(self) -> None:
        self.are_reused = False
        self._said.clear()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the output of every block but the last."""

        def keep(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._said.setdefault(self._batch, {})[number] = output

            return hook

        if not self.are_reused:
            yield
            return
        handles = [self._list[i].register_forward_hook(keep(i)) for i in range(len(self._list) - 1)]
        try:
            with self._watching():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def beginning_at(self, modules: Mapping[str, Any]) -> Iterator[None]:
        """Forward passes in which the blocks before the first of these modules are passed over."""
        blocks = {block_of(name) for name in modules}
        numbers = [
            int(block.rpartition(".")[2])
            for block in blocks
            if block != NO_BLOCK and block.rpartition(".")[0] == self._name
        ]
        if not self.are_reused or len(numbers) < len(blocks) or min(numbers, default=0) == 0:
            yield
            return
        with self._recalling(min(numbers)):
            yield

    @contextmanager
    def beginning_at_last(self) -> Iterator[None]:
        with self._recalling(len(self._list) - 1):
            yield

    @contextmanager
    def _recalling(self, first: int) -> Iterator[None]:
        originals = list(self._list)
        for number in range(first):
            self._list[number] = _Recalled(originals[number], self._recall, first - 1)
        try:
            with self._watching():
                yield
        finally:
            for number in range(first):
                self._list[number] = originals[number]

    def _recall(self, number: int) -> Any:
        """None for a batch that was not recorded: one that was halved for want of memory."""
        return self._said.get(self._batch, {}).get(number)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Know which batch is being computed."""

        def note(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
            self._batch = options["input_ids"].cpu().numpy().tobytes()

        handle = self._model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _Recalled(nn.Module):
    """Stands in place of a block, and says what the last of those passed over said."""

    def __init__(self, original: nn.Module, recall: Any, last: int):
        super().__init__()
        self._original = original
        self._recall = recall
        self._last = last

    def __getattr__(self, name: str) -> Any:
        """What the model reads off a block, such as its kind of attention, is the block's own."""
        if name == "_original":
            return super().__getattr__(name)
        own = self.__dict__.get("_modules", {}).get("_original")
        return getattr(own, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        said = self._recall(self._last)
        return self._original(*args, **options) if said is None else said


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The longest list of modules, and its name; an empty one where there is none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return max(lists, key=lambda found: len(found[1]), default=("", nn.ModuleList()))
