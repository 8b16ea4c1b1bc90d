"""A short batch on which it shows whether a model computes the same another way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.data.sequences import IGNORE_INDEX

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""Between one way of computing and the other: of the loss, and of a kernel by itself."""

_SHAPE = (2, 16)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of all gradients together: what bfloat16 rounds came to 0.047 in 30 layers.
_GRADIENT_TOLERANCE = {**TOLERANCE, "bf16": 0.15}
_STIRRED = 0.02


def dtype_of(precision: str) -> torch.dtype:
    """What products are computed in."""
    return _AUTOCAST.get(precision, torch.float32)


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradients: Sequence[torch.Tensor]


class Trial:
    """A short batch of random tokens, in evaluation, so that nothing is drawn."""

    def __init__(self, model: PeftModel, causal: PreTrainedModel, precision: str):
        self.model = model
        self.precision = precision
        self.dtype = dtype_of(precision)
        self.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        entries = causal.config.get_text_config().vocab_size
        ids = torch.randint(0, entries, _SHAPE, generator=generator)
        is_left_out = torch.rand(_SHAPE, generator=generator) < 0.5
        self.ids = ids.to(self.device)
        self.labels = ids.masked_fill(is_left_out, IGNORE_INDEX).to(self.device)
        self.trained = [one for one in model.parameters() if one.requires_grad]

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """With an adapter that does something: a fresh one's B is zero, and its A has no gradient.

        All is as it was afterwards, the random state included: it is not touched.
        """
        was_training = self.model.training
        kept = [one.detach().clone() for one in self.trained]
        generator = torch.Generator().manual_seed(1)
        self.model.eval()
        try:
            with torch.no_grad():
                for one in self.trained:
                    noise = torch.randn(one.shape, generator=generator) * _STIRRED
                    one.add_(noise.to(one))
            yield
        finally:
            with torch.no_grad():
                for one, before in zip(self.trained, kept, strict=True):
                    one.copy_(before)
            self.model.train(was_training)

    def forward(self) -> Any:
        with self._autocast():
            return self.model(input_ids=self.ids, labels=self.labels, use_cache=False)

    def outcome(self) -> Outcome:
        with torch.enable_grad():
            loss = self.forward().loss
            gradients = torch.autograd.grad(loss, self.trained, allow_unused=True)
        found = [torch.zeros(()) if one is None else one.float() for one in gradients]
        return Outcome(float(loss.detach()), found)

    def is_read_elsewhere(self, name: str) -> bool | None:
        """Whether the loss depends on what a module gives at places that are not supervised: then
        its gradient there is not zero, in whatever precision. None where it cannot be seen.
        """
        made: list[torch.Tensor] = []
        hook = self.model.get_submodule(name).register_forward_hook(
            lambda _, __, output: made.append(output)
        )
        try:
            with torch.enable_grad():
                loss = self.forward().loss
        finally:
            hook.remove()
        if len(made) != 1 or not made[0].requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss, made[0])
        if gradient.shape[:-1].numel() != self.labels.numel():
            return None
        by_place = gradient.reshape(*self.labels.shape, -1)
        return bool(by_place[:, :-1][self.labels[:, 1:] == IGNORE_INDEX].any())

    def compared(self, wanted: Outcome) -> tuple[str | None, float]:
        """(what is wrong, how far the gradients are apart)"""
        try:
            found = self.outcome()
        except Exception as error:  # whatever a kernel or its compiler has to say
            return f"it fails ({type(error).__name__}: {error})", 0.0
        tolerance = TOLERANCE[self.precision]
        if not abs(found.loss - wanted.loss) <= tolerance * max(abs(wanted.loss), 1.0):
            return f"on a trial the loss is {found.loss:.6g} instead of {wanted.loss:.6g}", 0.0
        pairs = list(zip(found.gradients, wanted.gradients, strict=True))
        off = sum(float((one - other).square().sum()) for one, other in pairs)
        size = sum(float(other.square().sum()) for _, other in pairs)
        apart = (off / size) ** 0.5 if size else 0.0
        if not apart <= _GRADIENT_TOLERANCE[self.precision]:
            return f"on a trial the gradients differ by {apart:.2g} of their size", apart
        return None, apart

    def _autocast(self) -> torch.autocast:
        dtype = _AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)
